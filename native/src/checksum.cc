#include "checksum.h"

#include <zlib.h>

namespace expertmesh {

Checksum Checksum::of_request(uint64_t id, uint64_t timeout_us, uint32_t layer, uint32_t output_dtype) {
  const uint64_t wide[] = {id, timeout_us};
  const uint32_t narrow[] = {layer, output_dtype};
  Checksum sum;
  sum.add(wide, sizeof wide);
  sum.add(narrow, sizeof narrow);
  return sum;
}

Checksum Checksum::of_answer(uint64_t id, uint32_t code) {
  Checksum sum;
  sum.add(&id, sizeof id);
  sum.add(&code, sizeof code);
  return sum;
}

void Checksum::add_tensor(uint32_t dtype, uint32_t rows, uint32_t width, const void* data, size_t size) {
  const uint32_t shape[] = {dtype, rows, width};
  add(shape, sizeof shape);
  add(data, size);
}

void Checksum::add_tensor(uint32_t dtype, uint32_t rows, uint32_t width, Bytes data) {
  add_tensor(dtype, rows, width, nullptr, 0);
  while (data.size() > 0) {
    size_t length;
    const uint8_t* front = data.front(&length);
    add(front, length);
    data.skip(length);
  }
}

void Checksum::add(const void* data, size_t size) {
  if (size > 0) value_ = static_cast<uint32_t>(crc32_z(value_, static_cast<const Bytef*>(data), size));
}

}  // namespace expertmesh
