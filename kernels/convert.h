// Element types as they come from Python, and conversions to and from float32: exact upwards, round-to-nearest-even
// downwards, with NaN, infinities and subnormal numbers kept, as torch converts them.
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace pbe {

// The codes of backends.DTYPE_CODE in Python.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, u8 = 3 };

PBE_INLINE std::int64_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::u8 ? 1 : 2; }

PBE_INLINE const void* advance(const void* data, std::int64_t elements, DType type) {
  return static_cast<const char*>(data) + elements * size_of(type);
}

PBE_INLINE void* advance(void* data, std::int64_t elements, DType type) {
  return static_cast<char*>(data) + elements * size_of(type);
}

PBE_INLINE float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PBE_INLINE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

PBE_INLINE float from_bf16(std::uint16_t half) { return float_of_bits(static_cast<std::uint32_t>(half) << 16); }

PBE_INLINE std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded >> 16);
}

// Without branches, so that loops over it vectorise on instruction sets without half-precision registers.
PBE_INLINE float from_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t shifted = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t exponent = shifted & 0x0f800000u;
  // 2^-14 is added and subtracted again: that normalises a subnormal without ever holding a subnormal float32.
  const float subnormal = float_of_bits(shifted + 0x38800000u) - float_of_bits(0x38800000u);
  const std::uint32_t rebias = exponent == 0x0f800000u ? 0x70000000u : 0x38000000u;
  const std::uint32_t magnitude = exponent == 0 ? bits_of_float(subnormal) : shifted + rebias;
  return float_of_bits(magnitude | sign);
}

PBE_INLINE std::uint16_t to_f16(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the float unit round at the right bit.
  const std::uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<std::uint16_t>(half | sign);
}

// n elements of `type` at `in` to float32, and back; in and out must not overlap.
void widen(const void* in, DType type, float* out, std::int64_t n);
void narrow(const float* in, void* out, DType type, std::int64_t n);

}  // namespace pbe
