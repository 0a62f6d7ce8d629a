// How busy a replica is, how long requests wait and how many rows each of its experts gets: expert_service/load.py in
// C++. The server's lock guards it. Times are nanoseconds of the monotonic clock.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace expertmesh::server {

inline uint32_t microseconds(int64_t ns) {
  return static_cast<uint32_t>(std::clamp<int64_t>((ns + 500) / 1000, 0, UINT32_MAX));
}

/// How long requests waited, over those taken in the last 5 to 6 seconds: a histogram for each second, with 8 buckets
/// per power of two (HdrHistogram's layout), so that a quantile is off by one part in 16 of its value at most.
class QueueWaits {
 public:
  explicit QueueWaits(int64_t now) : taken_at_(now) {}

  /// Something was taken at `now`, if only to be dropped.
  void took(int64_t now) { taken_at_ = now; }

  /// A request that is taken at `now` has waited for so long.
  void add(int64_t now, uint32_t wait_us) {
    const int64_t second = now / kSecondNs;
    Slice& slice = slices_[static_cast<size_t>(second % kSlices)];
    if (slice.second != second) slice = Slice{second, {}};
    ++slice.counts[bucket(wait_us)];
  }

  /// Median and 95th percentile, microseconds. `oldest`: when the request came that has waited longest, negative
  /// where nothing waits. Where none was taken for a second, both are at least what that one has waited.
  std::pair<uint32_t, uint32_t> quantiles(int64_t now, int64_t oldest) const {
    std::array<uint64_t, kBuckets> counts{};
    uint64_t total = 0;
    for (const Slice& slice : slices_) {
      if (slice.second < 0 || now / kSecondNs - slice.second >= kSlices) continue;
      for (size_t i = 0; i < kBuckets; ++i) {
        counts[i] += slice.counts[i];
        total += slice.counts[i];
      }
    }
    uint32_t stuck_us = 0;
    if (oldest >= 0 && now - std::max(taken_at_, oldest) >= kStuckNs) {
      stuck_us = microseconds(now - oldest);
    }
    return {std::max(stuck_us, quantile(counts, (50 * total + 99) / 100)),
            std::max(stuck_us, quantile(counts, (95 * total + 99) / 100))};
  }

 private:
  static constexpr int64_t kSecondNs = 1'000'000'000;
  static constexpr int64_t kSlices = 6;
  static constexpr int64_t kStuckNs = kSecondNs;
  static constexpr size_t kBuckets = 240;

  struct Slice {
    int64_t second = -1;
    std::array<uint32_t, kBuckets> counts{};
  };

  static size_t bucket(uint32_t wait_us) {
    int exponent = 0;
    while ((wait_us >> exponent) >= 16) ++exponent;
    return static_cast<size_t>(8 * exponent) + (wait_us >> exponent);
  }

  /// The middle of the bucket that holds the request of that rank, counted from 1.
  static uint32_t quantile(const std::array<uint64_t, kBuckets>& counts, uint64_t rank) {
    if (rank == 0) return 0;
    size_t i = 0;
    for (uint64_t seen = counts[0]; seen < rank; seen += counts[i]) ++i;
    if (i < 16) return static_cast<uint32_t>(i);
    const size_t exponent = i / 8 - 1;
    return static_cast<uint32_t>(((i % 8 + 8) << exponent) + (size_t{1} << exponent >> 1));
  }

  int64_t taken_at_;
  std::array<Slice, kSlices> slices_;
};

/// Busy share and rows per second, both averaged with exponentially falling weight over the last second or so.
class LoadMeter {
 public:
  explicit LoadMeter(int64_t now) : waits(now), then_(now) {}

  QueueWaits waits;

  void add_layer(uint32_t layer, size_t experts) { expert_rows_[layer].assign(experts, 0); }

  void begin(int64_t now) {
    advance(now);
    running_ = true;
  }

  /// A batch of `rows` rows ended.
  void end(int64_t now, uint32_t rows) {
    advance(now);
    running_ = false;
    rows_per_s_ += rows / kTauS;
    rows_total_ += rows;
  }

  void count(uint32_t layer, const std::vector<int32_t>& experts) {
    auto& rows = expert_rows_.at(layer);
    for (const int32_t expert : experts) ++rows[static_cast<size_t>(expert)];
  }

  double busy(int64_t now) {
    advance(now);
    return busy_;
  }

  double rows_per_s(int64_t now) {
    advance(now);
    return rows_per_s_;
  }

  uint64_t rows_total() const { return rows_total_; }
  const std::map<uint32_t, std::vector<int64_t>>& expert_rows() const { return expert_rows_; }

 private:
  static constexpr double kTauS = 1.0;

  void advance(int64_t now) {
    if (now <= then_) return;
    const double fading = std::exp(static_cast<double>(then_ - now) * 1e-9 / kTauS);
    then_ = now;
    busy_ = running_ ? 1.0 - (1.0 - busy_) * fading : busy_ * fading;
    rows_per_s_ *= fading;
  }

  int64_t then_;
  bool running_ = false;
  double busy_ = 0;
  double rows_per_s_ = 0;
  uint64_t rows_total_ = 0;
  std::map<uint32_t, std::vector<int64_t>> expert_rows_;
};

}  // namespace expertmesh::server
