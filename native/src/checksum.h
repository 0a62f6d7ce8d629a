// The checksum of expert.proto's requests and answers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protobuf.h"

namespace expertmesh {

/// CRC-32 (IEEE 802.3) over what is added, in its order.
class Checksum {
 public:
  /// Of a request, up to its tensors.
  static Checksum of_request(uint64_t id, uint64_t timeout_us, uint32_t layer, uint32_t output_dtype);
  /// Of an answer, up to its output.
  static Checksum of_answer(uint64_t id, uint32_t code);

  void add_tensor(uint32_t dtype, uint32_t rows, uint32_t width, const void* data, size_t size);
  void add_tensor(uint32_t dtype, uint32_t rows, uint32_t width, Bytes data);

  uint32_t value() const { return value_; }

 private:
  void add(const void* data, size_t size);

  uint32_t value_ = 0;
};

}  // namespace expertmesh
