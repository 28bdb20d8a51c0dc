// What products of bfloat16 numbers are made of. Callers look at level() first: it takes Level::bf16.
#pragma once

#include <cstdint>
#include <cstring>

#include "avx512.h"

#ifdef PBE_X86
#define PBE_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace pbe::bf16 {

PBE_BF16 PBE_INLINE __m512 load(const std::uint16_t* data, __mmask16 lanes) {
  return avx512::load<DType::bf16>(data, lanes);
}

// Subnormal numbers become zero, as in the products.
PBE_BF16 PBE_INLINE __m256i narrow(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

// Two numbers side by side, in all lanes.
PBE_BF16 PBE_INLINE __m512bh pair(const std::uint16_t* data) {
  std::int32_t both;
  std::memcpy(&both, data, sizeof both);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

}  // namespace pbe::bf16
#endif
