// How busy a replica is and how many rows each of its experts gets: expert_service/load.py in C++. The server's lock
// guards it. Times are nanoseconds of the monotonic clock.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

namespace expertmesh::server {

/// Busy share and rows per second, both averaged with exponentially falling weight over the last second or so.
class LoadMeter {
 public:
  explicit LoadMeter(int64_t now) : then_(now) {}

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
