#include "numbers.h"

#include <algorithm>
#include <cstring>

// a copy of the loops per instruction set, chosen when the library is loaded; sanitizers cannot run that early
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define EXPERTMESH_VECTOR __attribute__((target_clones("avx2", "default")))
#else
#define EXPERTMESH_VECTOR
#endif

namespace expertmesh {
namespace {

template <typename T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on the nearest is infinity
  if (magnitude < 0x38800000) {
    // subnormal: adding 0.5 leaves the multiple of 2^-24, rounded, in the mantissa's low bits
    return sign | static_cast<uint16_t>(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const auto rounded = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

EXPERTMESH_VECTOR void add_float32(float* total, const uint8_t* rows, size_t count) {
  for (size_t i = 0; i < count; ++i) total[i] += load<float>(rows + 4 * i);
}

EXPERTMESH_VECTOR void add_bfloat16(float* total, const uint8_t* rows, size_t count) {
  for (size_t i = 0; i < count; ++i) total[i] += from_bits(static_cast<uint32_t>(load<uint16_t>(rows + 2 * i)) << 16);
}

EXPERTMESH_VECTOR void add_float16(float* total, const uint8_t* rows, size_t count) {
  for (size_t i = 0; i < count; ++i) total[i] += half_to_float(load<uint16_t>(rows + 2 * i));
}

EXPERTMESH_VECTOR void round_to_bfloat16(uint8_t* target, const float* source, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const uint16_t value = float_to_bfloat16(source[i]);
    std::memcpy(target + 2 * i, &value, 2);
  }
}

EXPERTMESH_VECTOR void round_to_float16(uint8_t* target, const float* source, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const uint16_t value = float_to_half(source[i]);
    std::memcpy(target + 2 * i, &value, 2);
  }
}

}  // namespace

void add(float* total, const void* rows, uint32_t dtype, size_t count) {
  const auto* from = static_cast<const uint8_t*>(rows);
  if (dtype == kFloat32) add_float32(total, from, count);
  if (dtype == kBFloat16) add_bfloat16(total, from, count);
  if (dtype == kFloat16) add_float16(total, from, count);
}

void round_to(void* target, uint32_t dtype, const float* source, size_t count) {
  auto* to = static_cast<uint8_t*>(target);
  if (dtype == kFloat32) std::memcpy(to, source, 4 * count);
  if (dtype == kBFloat16) round_to_bfloat16(to, source, count);
  if (dtype == kFloat16) round_to_float16(to, source, count);
}

void convert(void* target, uint32_t to, const void* source, uint32_t from, size_t count) {
  if (to == from) {
    if (count > 0) std::memcpy(target, source, count * element_size(to));
  } else if (from == kFloat32) {
    round_to(target, to, static_cast<const float*>(source), count);
  } else {
    auto* into = static_cast<uint8_t*>(target);
    const auto* of = static_cast<const uint8_t*>(source);
    float widened[1024];
    for (size_t done = 0; done < count; done += 1024) {
      const size_t part = std::min<size_t>(1024, count - done);
      std::fill_n(widened, part, 0.0f);
      add(widened, of + done * element_size(from), from, part);
      round_to(into + done * element_size(to), to, widened, part);
    }
  }
}

}  // namespace expertmesh
