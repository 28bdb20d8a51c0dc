#include "convert.h"

namespace pbe {
namespace {

PBE_CLONES void widen_bf16(const std::uint16_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
}

PBE_CLONES void widen_f16(const std::uint16_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = from_f16(in[i]);
}

PBE_CLONES void widen_u8(const std::uint8_t* in, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

PBE_CLONES void narrow_bf16(const float* in, std::uint16_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

PBE_CLONES void narrow_f16(const float* in, std::uint16_t* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = to_f16(in[i]);
}

}  // namespace

void widen(const void* in, DType type, float* out, std::int64_t n) {
  switch (type) {
    case DType::f32: std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float)); break;
    case DType::f16: widen_f16(static_cast<const std::uint16_t*>(in), out, n); break;
    case DType::bf16: widen_bf16(static_cast<const std::uint16_t*>(in), out, n); break;
    case DType::u8: widen_u8(static_cast<const std::uint8_t*>(in), out, n); break;
  }
}

void narrow(const float* in, void* out, DType type, std::int64_t n) {
  switch (type) {
    case DType::f32: std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float)); break;
    case DType::f16: narrow_f16(in, static_cast<std::uint16_t*>(out), n); break;
    case DType::bf16: narrow_bf16(in, static_cast<std::uint16_t*>(out), n); break;
    case DType::u8: break;  // no operation stores uint8
  }
}

}  // namespace pbe
