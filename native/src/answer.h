// What comes back for one dispatch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "protobuf.h"

namespace expertmesh {

/// As in expert.proto.
enum Code : uint32_t { kOk = 1, kUnavailable = 5, kDeadlineExceeded = 6, kInternal = 7, kDataLoss = 8 };

struct Answer {
  uint64_t id = 0;
  uint32_t code = 0;
  std::string message;
  uint32_t dtype = 0;
  uint32_t rows = 0;
  uint32_t width = 0;
  /// In the slices that were parsed.
  Bytes output;
  uint32_t queue_us = 0;
  uint32_t compute_us = 0;
  uint32_t queued_rows = 0;
  std::optional<uint32_t> checksum;
};

/// Reads a DispatchResponse; false where the bytes are none.
bool parse_answer(const Slices& slices, Answer* answer);

}  // namespace expertmesh
