// Whose rows are computed next where several routers wait, and who may still wait: start-time fair queueing; the same
// functions as in expert_service/turns.py, which says more. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>

namespace expertmesh::server {

inline bool may_wait(uint64_t rows, uint64_t own_rows, uint64_t callers, uint64_t queued_rows,
                     uint64_t max_queued_rows) {
  if (queued_rows + rows <= max_queued_rows) return true;
  const uint64_t share = own_rows > 0 ? max_queued_rows / callers : max_queued_rows;
  return own_rows + rows <= share && queued_rows + rows <= 2 * max_queued_rows;
}

/// Callers are known by an address or number of their own.
class Turns {
 public:
  uint64_t rows_of(uintptr_t caller) const {
    const auto found = callers_.find(caller);
    return found == callers_.end() ? 0 : found->second.rows;
  }

  /// How many have rows that wait, if this one had some.
  uint64_t callers_with(uintptr_t caller) const {
    uint64_t count = rows_of(caller) == 0;
    for (const auto& [who, one] : callers_) count += one.rows > 0;
    return count;
  }

  /// The turn of a job that begins to wait.
  uint64_t join(uintptr_t caller, uint32_t rows) {
    Caller& one = callers_[caller];
    const uint64_t turn = std::max(now_, one.next_turn);
    one.next_turn = turn + std::max<uint32_t>(1, rows);
    one.rows += rows;
    return turn;
  }

  /// A job waits no longer.
  void leave(uintptr_t caller, uint32_t rows) { callers_[caller].rows -= rows; }

  /// The least turn that waited has come; none: nothing waits any more.
  void advance(std::optional<uint64_t> turn) {
    now_ = turn.value_or(0);
    for (auto one = callers_.begin(); one != callers_.end();) {
      const bool over = !turn || (one->second.rows == 0 && one->second.next_turn <= now_);
      one = over ? callers_.erase(one) : std::next(one);
    }
  }

 private:
  struct Caller {
    uint64_t rows = 0;
    uint64_t next_turn = 0;
  };

  uint64_t now_ = 0;
  std::map<uintptr_t, Caller> callers_;
};

}  // namespace expertmesh::server
