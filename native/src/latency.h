// What one exchange with a replica usually takes, and from when on an answer is late: router_service/latency.py in C++,
// which has no `usual`, since nothing polls there.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace expertmesh {

/// Mean and mean deviation of the round trip, in nanoseconds, for each power of two of rows: the estimator of RFC 6298.
class Latency {
 public:
  void note(size_t rows, uint64_t round_trip_ns) {
    Estimate& known = classes_[class_of(rows)];
    const auto taken = static_cast<double>(round_trip_ns);
    if (known.mean < 0) {
      known = {taken, taken / 2};
      return;
    }
    known.deviation += (std::abs(taken - known.mean) - known.deviation) / 4;
    known.mean += (taken - known.mean) / 8;
  }

  /// Whether anything was noted.
  bool known() const {
    return std::any_of(classes_.begin(), classes_.end(), [](const Estimate& one) { return one.mean >= 0; });
  }

  /// Nanoseconds that an answer to so many rows usually takes; at most a second, which is also said of what is not known.
  int64_t usual(size_t rows) const {
    const double mean = classes_[class_of(rows)].mean;
    return mean < 0 ? kUnknown : static_cast<int64_t>(std::min<double>(mean, kUnknown));
  }

  /// Nanoseconds after which an answer to so many rows is late. What is known of fewer rows is scaled up.
  uint64_t late_after(size_t rows) const {
    const size_t wanted = class_of(rows);
    for (size_t below = 0; below <= wanted; ++below) {
      const Estimate& known = classes_[wanted - below];
      if (known.mean >= 0) return bounded((known.mean + 4 * known.deviation) * std::exp2(static_cast<double>(below)));
    }
    for (size_t above = wanted + 1; above < classes_.size(); ++above) {
      const Estimate& known = classes_[above];
      if (known.mean >= 0) return bounded(known.mean + 4 * known.deviation);
    }
    return kUnknown;
  }

 private:
  struct Estimate {
    double mean = -1, deviation = 0;
  };
  static constexpr uint64_t kFloor = 100'000'000, kUnknown = 1'000'000'000;
  static constexpr double kFactor = 2, kCeiling = 10e9;

  static size_t class_of(size_t rows) {
    size_t number = 0;
    while (rows > 1 && number + 1 < kClasses) {
      rows >>= 1;
      ++number;
    }
    return number;
  }

  static uint64_t bounded(double usual) {
    return std::max(kFloor, static_cast<uint64_t>(std::min(kCeiling, kFactor * usual)));
  }

  static constexpr size_t kClasses = 20;
  std::array<Estimate, kClasses> classes_;
};

}  // namespace expertmesh
