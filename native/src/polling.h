// Whether to poll for what is waited for before going to sleep: waking takes the kernel longer than a short wait does,
// most of all on a virtual core.
#pragma once

#include <algorithm>
#include <cstdint>

namespace expertmesh {

/// Nanoseconds. What usually takes longer is slept for at once.
constexpr int64_t kWorthPolling = 500'000;

/// How long to poll for what usually takes `usual` nanoseconds; 0: not at all.
constexpr int64_t polling_time(int64_t usual) { return usual <= kWorthPolling ? 2 * usual : 0; }

/// How long one waits usually: a mean that forgets by eighths.
class Pauses {
 public:
  void note(int64_t took) { mean_ += (std::min(took, kLongest) - mean_) / 8; }
  int64_t usual() const { return mean_; }

 private:
  /// Longer ones count as much, so that a quiet hour is forgotten within a few requests.
  static constexpr int64_t kLongest = 5 * kWorthPolling;
  int64_t mean_ = kLongest;
};

}  // namespace expertmesh
