// Who waits, and what forms a batch: what waits for one layer, from whatever stream it came, in fair turns; as in
// expert_service/batcher.py. Not thread-safe: the server's lock guards it.
#pragma once

#include <map>
#include <utility>

#include "server_request.h"
#include "server_turns.h"

namespace expertmesh::server {

/// Jobs of one layer to compute together, all with rows of one type, and those that were taken too late.
struct Batch {
  uint32_t layer = 0;
  uint32_t dtype = 0;
  uint32_t rows = 0;
  size_t pairs = 0;
  std::vector<Job> jobs;
  std::vector<Job> expired;
};

class Queue {
 public:
  /// `max_queued_rows` bounds the rows that wait, over all layers, as may_wait() says; `max_batch_rows` those of one
  /// batch, which holds at least one job however large that is.
  Queue(uint64_t max_queued_rows, uint64_t max_batch_rows)
      : max_queued_rows(max_queued_rows), max_batch_rows_(max_batch_rows) {}

  /// kOk and the job has been moved from; kResourceExhausted if it does not fit; kUnavailable once closed.
  Code submit(Job* job);

  /// The next batch: of the layer whose first job has the least turn, in the order of turns; jobs of streams that are
  /// gone are dropped. It may hold no job; false where nothing waits.
  bool take(int64_t now, Batch* batch);

  void close() { closed_ = true; }
  bool closed() const { return closed_; }
  bool empty() const { return layers_.empty(); }
  uint64_t queued_rows() const { return queued_rows_; }
  /// When the request came that has waited longest; negative where nothing waits.
  int64_t oldest() const;

  const uint64_t max_queued_rows;

 private:
  /// A job's turn and its number in the order of arrival.
  using Place = std::pair<uint64_t, uint64_t>;

  const uint64_t max_batch_rows_;
  uint64_t queued_rows_ = 0;
  uint64_t next_number_ = 0;
  Turns turns_;
  std::map<uint32_t, std::map<Place, Job>> layers_;
  bool closed_ = false;
};

}  // namespace expertmesh::server
