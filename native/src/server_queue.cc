#include "server_queue.h"

#include <algorithm>

#include "server_call.h"

namespace expertmesh::server {

Code Queue::submit(Job* job) {
  if (closed_) return kUnavailable;
  if (queued_rows_ + job->rows > max_queued_rows) return kResourceExhausted;
  queued_rows_ += job->rows;
  layers_[job->layer].push_back(std::move(*job));
  return kOk;
}

bool Queue::take(int64_t now, Batch* batch) {
  if (layers_.empty()) return false;
  const auto oldest = std::min_element(layers_.begin(), layers_.end(), [](const auto& one, const auto& other) {
    return one.second.front().arrived_at < other.second.front().arrived_at;
  });
  batch->layer = oldest->first;
  auto& queue = oldest->second;
  while (!queue.empty()) {
    Job& job = queue.front();
    const bool fits = batch->rows == 0 || batch->rows + job.rows <= max_batch_rows_;
    const bool same_type = batch->jobs.empty() || job.dtype == batch->dtype;
    if (!fits || !same_type) break;
    queued_rows_ -= job.rows;
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
    queue.pop_front();
  }
  if (queue.empty()) layers_.erase(oldest);
  return true;
}

int64_t Queue::oldest() const {
  int64_t oldest = layers_.empty() ? -1 : INT64_MAX;
  for (const auto& [layer, queue] : layers_) oldest = std::min(oldest, queue.front().arrived_at);
  return oldest;
}

}  // namespace expertmesh::server
