// Element types of the wire and sums over them. Addresses need no alignment: rows are read where gRPC has received them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertmesh {

/// As in expert.proto.
enum DType : uint32_t { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 4 };

/// Bytes of one element; 0: no such type.
inline size_t element_size(uint32_t dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kBFloat16 || dtype == kFloat16 ? 2 : 0;
}

inline bool is_floating(uint32_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

/// total[i] += rows[i], in fp32, for `count` elements of a floating type.
void add(float* total, const void* rows, uint32_t dtype, size_t count);

/// target[i] = source[i] rounded to nearest, ties to even, as torch does.
void round_to(void* target, uint32_t dtype, const float* source, size_t count);

/// target [count] of type `to` = source [count] of type `from`, both floating.
void convert(void* target, uint32_t to, const void* source, uint32_t from, size_t count);

}  // namespace expertmesh
