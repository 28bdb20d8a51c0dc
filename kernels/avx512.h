// Registers of 16 floats, loaded from and stored as the types of convert.h: for loops that are written by hand, since
// the compiler does not find them. Callers look at level() first.
#pragma once

#include <cstdint>

#include "clones.h"
#include "convert.h"
#include "levels.h"

#ifdef PBE_X86
#ifndef __clang__
// gcc's own headers declare "undefined" registers in a way that it then warns of (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define PBE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace pbe::avx512 {

// Elements in a register.
constexpr std::int64_t kLanes = 16;

PBE_INLINE __mmask16 first_lanes(std::int64_t n) {
  return n >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1u << n) - 1u);
}

// Lanes outside of the mask are zero, and their memory is not touched.
template <DType Type>
PBE_AVX512 PBE_INLINE __m512 load(const void* data, __mmask16 mask) {
  if constexpr (Type == DType::f32) return _mm512_maskz_loadu_ps(mask, data);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, data);
  if constexpr (Type == DType::f16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Those of the lanes where a bfloat16 number is above zero, which a NaN is not.
PBE_AVX512 PBE_INLINE __mmask16 above_zero(const std::uint16_t* data, __mmask16 lanes) {
  // As integers the positive numbers are 1 to 0x7f80, the infinity.
  const __m256i less_one = _mm256_sub_epi16(_mm256_maskz_loadu_epi16(lanes, data), _mm256_set1_epi16(1));
  return _mm256_cmplt_epu16_mask(less_one, _mm256_set1_epi16(0x7f80));
}

// to_bf16 of convert.h.
PBE_AVX512 PBE_INLINE __m256i rounded_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// The instruction for it takes subnormal numbers for zero and lets a NaN keep its bits: both are rare, and go the long
// way. It is not written as an intrinsic, which would ask for another target here and in all that this is inlined into.
PBE_AVX512 PBE_INLINE __mmask16 not_for_instruction(__m512 value) { return _mm512_fpclass_ps_mask(value, 0xa1); }

template <bool HasBf16>
PBE_AVX512 PBE_INLINE __m256i to_bf16(__m512 value) {
  if constexpr (HasBf16) {
    if (__builtin_expect(not_for_instruction(value) == 0, 1)) {
      __m256i halves;
      __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(value));
      return halves;
    }
  }
  return rounded_to_bf16(value);
}

template <bool HasBf16>
PBE_AVX512 PBE_INLINE __m512i to_bf16(__m512 low, __m512 high) {
  if constexpr (HasBf16) {
    if (__builtin_expect(_kortestz_mask16_u8(not_for_instruction(low), not_for_instruction(high)), 1)) {
      __m512i halves;
      __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(high), "v"(low));
      return halves;
    }
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded_to_bf16(low)), rounded_to_bf16(high), 1);
}

// As round_to_u8 does it, half to even, for values in [0, 255].
PBE_AVX512 PBE_INLINE __m128i to_u8(__m512 value) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)); }

template <DType Type, bool HasBf16>
PBE_AVX512 PBE_INLINE void store(void* data, __m512 value, __mmask16 mask) {
  if constexpr (Type == DType::f32) {
    _mm512_mask_storeu_ps(data, mask, value);
  } else if constexpr (Type == DType::bf16) {
    _mm256_mask_storeu_epi16(data, mask, to_bf16<HasBf16>(value));
  } else if constexpr (Type == DType::f16) {
    const __m256i halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(data, mask, halves);
  } else {
    _mm_mask_storeu_epi8(data, mask, to_u8(value));
  }
}

// Two registers, whole.
template <DType Type, bool HasBf16>
PBE_AVX512 PBE_INLINE void store(void* data, __m512 low, __m512 high) {
  if constexpr (Type == DType::bf16) {
    _mm512_storeu_si512(data, to_bf16<HasBf16>(low, high));
  } else {
    store<Type, HasBf16>(data, low, first_lanes(kLanes));
    store<Type, HasBf16>(advance(data, kLanes, Type), high, first_lanes(kLanes));
  }
}

}  // namespace pbe::avx512
#endif
