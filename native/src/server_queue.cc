#include "server_queue.h"

#include <algorithm>

#include "server_call.h"

namespace expertmesh::server {

namespace {

uintptr_t caller_of(const Job& job) { return reinterpret_cast<uintptr_t>(job.call.get()); }

}  // namespace

Code Queue::submit(Job* job) {
  if (closed_) return kUnavailable;
  const uintptr_t caller = caller_of(*job);
  if (!may_wait(job->rows, turns_.rows_of(caller), turns_.callers_with(caller), queued_rows_, max_queued_rows)) {
    return kResourceExhausted;
  }
  queued_rows_ += job->rows;
  const Place place{turns_.join(caller, job->rows), next_number_++};
  layers_[job->layer].emplace(place, std::move(*job));
  return kOk;
}

bool Queue::take(int64_t now, Batch* batch) {
  if (layers_.empty()) return false;
  const auto first = std::min_element(layers_.begin(), layers_.end(), [](const auto& one, const auto& other) {
    return one.second.begin()->first < other.second.begin()->first;
  });
  batch->layer = first->first;
  auto& queue = first->second;
  const uint64_t turn = queue.begin()->first.first;
  while (!queue.empty()) {
    Job& job = queue.begin()->second;
    const bool fits = batch->rows == 0 || batch->rows + job.rows <= max_batch_rows_;
    const bool same_type = batch->jobs.empty() || job.dtype == batch->dtype;
    if (!fits || !same_type) break;
    queued_rows_ -= job.rows;
    turns_.leave(caller_of(job), job.rows);
    if (!job.call->gone()) {
      if (now > job.deadline) {
        batch->expired.push_back(std::move(job));
      } else {
        batch->dtype = job.dtype;
        batch->rows += job.rows;
        batch->pairs += job.pairs.rows.size();
        batch->jobs.push_back(std::move(job));
      }
    }
    queue.erase(queue.begin());
  }
  if (queue.empty()) layers_.erase(first);
  turns_.advance(layers_.empty() ? std::nullopt : std::optional(turn));
  return true;
}

int64_t Queue::oldest() const {
  int64_t oldest = layers_.empty() ? -1 : INT64_MAX;
  for (const auto& [layer, queue] : layers_) {
    for (const auto& [place, job] : queue) oldest = std::min(oldest, job.arrived_at);
  }
  return oldest;
}

}  // namespace expertmesh::server
