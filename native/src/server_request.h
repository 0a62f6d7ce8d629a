// What a dispatch must look like before it may wait: hostile input ends here. The same checks, in the same order and with
// the same texts, as expert_service/request.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "protobuf.h"

namespace expertmesh::server {

class Call;

/// As in expert.proto.
enum Code : uint32_t {
  kOk = 1,
  kInvalidArgument = 2,
  kNotFound = 3,
  kResourceExhausted = 4,
  kUnavailable = 5,
  kDeadlineExceeded = 6,
  kInternal = 7,
  kDataLoss = 8,
};

/// What requests may ask for.
struct Served {
  uint32_t hidden_size;
  /// MoE layer -> one byte per expert, 1 where it is held.
  std::map<uint32_t, std::string> held;
  /// The layers, for people.
  std::string layers_text;
  uint32_t max_rows;
  uint32_t max_pairs;
};

/// The P (row, expert) pairs of a request.
struct Pairs {
  std::vector<int32_t> rows;
  std::vector<int32_t> experts;
  std::vector<float> weights;
};

/// One dispatch that waits for its layer. Times are nanoseconds of the monotonic clock.
struct Job {
  std::shared_ptr<Call> call;
  uint64_t id = 0;
  uint32_t layer = 0;
  uint32_t rows = 0;
  uint32_t dtype = 0;
  uint32_t output_dtype = 0;
  /// As received; `hidden_states` points into them.
  Slices message;
  Bytes hidden_states;
  Pairs pairs;
  int64_t arrived_at = 0;
  /// When nobody waits for the answer any more.
  int64_t deadline = 0;
  /// It came with a checksum, and its answer gets one.
  bool checked = false;
  /// Of its answer, once there are sums.
  uint32_t checksum = 0;
};

enum class Parsed {
  kJob,
  /// To be answered with a status of its own; the stream lives on.
  kRefused,
  /// No protobuf message: the stream ends.
  kMalformed,
};

struct Refusal {
  Code code = kOk;
  std::string message;
};

/// Fills `job` (`id` and `checked` in any case that is not kMalformed) or `refusal`.
Parsed parse(Slices message, const Served& served, int64_t now, Job* job, Refusal* refusal);

}  // namespace expertmesh::server
