// Sampling from windows (sampling.h): the rows that a block of outputs needs are held in registers and permuted, and
// the sums are finished and stored from registers, too.
#pragma once

#include <type_traits>

#include "avx512.h"
#include "sampling.h"

#ifdef PBE_X86
#define PBE_WINDOWS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))

namespace pbe::warp::avx512 {

using namespace pbe::avx512;
static_assert(kBlock == kLanes);

// The weights of a block of outputs.
struct Weights {
  __m512 a, b, c, d;
};

PBE_WINDOWS PBE_INLINE Weights weights_at(const Taps& taps, std::int64_t i) {
  const float *upper = taps.weight + i, *lower = upper + 2 * taps.weight_stride;
  return {_mm512_loadu_ps(upper), _mm512_loadu_ps(upper + taps.weight_stride), _mm512_loadu_ps(lower),
          _mm512_loadu_ps(lower + taps.weight_stride)};
}

PBE_WINDOWS PBE_INLINE __m512i places_at(const std::uint8_t* places, std::int64_t i) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places + i)));
}

// Of 16 outputs whose taps lie in Rows rows of floats. Rows is a constant so that the loops over rows unroll.
template <int Rows>
struct FloatBlock {
  Weights weight;
  __m512i left_place, right_place;  // permutations look at the low five bits only: the column
  __mmask16 here[Rows];             // whose upper taps lie in this row
  std::int64_t base;

  PBE_WINDOWS PBE_INLINE FloatBlock(const Plane& plane, const Taps& taps, const Window& window,
                                    const std::uint8_t* places, std::int64_t i)
      : weight(weights_at(taps, i)), left_place(places_at(places, i)), base(window.base) {
    right_place = _mm512_add_epi32(left_place, _mm512_set1_epi32(plane.right));
    const __m512i row_of = _mm512_srli_epi32(left_place, 5);
    for (int row = 0; row < Rows; ++row) here[row] = _mm512_cmpeq_epi32_mask(row_of, _mm512_set1_epi32(row));
  }

  PBE_WINDOWS PBE_INLINE __m512 sum(const float* in, const Plane& plane) const {
    const float* at = in + base;
    __m512 left[Rows], right[Rows];
    for (int row = 0; row < Rows; ++row, at += plane.row) {
      __m512 first = _mm512_loadu_ps(at);
      const __m512 second = _mm512_castps256_ps512(_mm256_loadu_ps(at + 16));
      // A permutation overwrites an operand; without this gcc loads it twice, across cache lines, and not copies it.
      __asm__("" : "+v"(first));
      left[row] = _mm512_permutex2var_ps(first, left_place, second);
      right[row] = _mm512_permutex2var_ps(first, right_place, second);
    }
    __m512 a = left[0], b = right[0], c = left[1], d = right[1];
    for (int row = 1; row < Rows - 1; ++row) {
      a = _mm512_mask_mov_ps(a, here[row], left[row]);
      b = _mm512_mask_mov_ps(b, here[row], right[row]);
      c = _mm512_mask_mov_ps(c, here[row], left[row + 1]);
      d = _mm512_mask_mov_ps(d, here[row], right[row + 1]);
    }
    __m512 value = _mm512_add_ps(_mm512_mul_ps(weight.a, a), _mm512_mul_ps(weight.b, b));
    value = _mm512_add_ps(value, _mm512_mul_ps(weight.c, c));
    return _mm512_add_ps(value, _mm512_mul_ps(weight.d, d));
  }
};

// Of 16 outputs whose taps lie in up to four rows of bytes, all four of which one permutation reaches.
struct ByteBlock {
  // A byte x below the upper bytes of 2^23 is the float 2^23 + x, and w (2^23 + x) - w 2^23 with one rounding at the
  // end is the product w x as float32 rounds it: so the fused operation also stands in for a conversion. Weights for
  // which that does not hold have no window: drop_windows.
  static constexpr int kMagic = 0x4b000000;
  Weights weight, shifted;
  __m512i a, b, c, d;  // places of the taps, and the upper bytes of 2^23
  std::int64_t base, row1, row2, row3;

  PBE_WINDOWS PBE_INLINE ByteBlock(const Plane& plane, const Taps& taps, const Window& window,
                                   const std::uint8_t* places, std::int64_t i)
      : weight(weights_at(taps, i)), base(window.base) {
    const __m512 magic = _mm512_set1_ps(0x1p23f);
    shifted = {_mm512_mul_ps(weight.a, magic), _mm512_mul_ps(weight.b, magic), _mm512_mul_ps(weight.c, magic),
               _mm512_mul_ps(weight.d, magic)};
    a = _mm512_add_epi32(places_at(places, i), _mm512_set1_epi32(kMagic));
    b = _mm512_add_epi32(a, _mm512_set1_epi32(plane.right));
    c = _mm512_add_epi32(a, _mm512_set1_epi32(32));
    d = _mm512_add_epi32(a, _mm512_set1_epi32(32 + plane.right));
    row1 = window.further[0];
    row2 = window.further[1];
    row3 = window.further[2];
  }

  PBE_WINDOWS PBE_INLINE static __m512i two_rows(const std::uint8_t* first, const std::uint8_t* second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
  }

  PBE_WINDOWS PBE_INLINE static __m512 product(__m512i upper, __m512i lower, __m512i place, __m512 weight,
                                               __m512 shifted) {
    const __m512i tap = _mm512_mask2_permutex2var_epi8(upper, place, 0x1111111111111111u, lower);
    return _mm512_fmsub_ps(weight, _mm512_castsi512_ps(tap), shifted);
  }

  PBE_WINDOWS PBE_INLINE __m512 sum(const std::uint8_t* in, const Plane&) const {
    const std::uint8_t* at = in + base;
    const __m512i upper = two_rows(at, at + row1), lower = two_rows(at + row2, at + row3);
    __m512 value =
        _mm512_add_ps(product(upper, lower, a, weight.a, shifted.a), product(upper, lower, b, weight.b, shifted.b));
    value = _mm512_add_ps(value, product(upper, lower, c, weight.c, shifted.c));
    return _mm512_add_ps(value, product(upper, lower, d, weight.d, shifted.d));
  }
};

// Of 16 outputs whose taps lie too far apart: every tap is a load.
template <class In>
struct LooseBlock {
  Weights weight;
  const std::int32_t* offset;

  PBE_WINDOWS PBE_INLINE LooseBlock(const Taps& taps, std::int64_t i)
      : weight(weights_at(taps, i)), offset(taps.offset + i) {}

  PBE_WINDOWS PBE_INLINE __m512 taps_at(const In* in) const {
    float values[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) values[i] = in[offset[i]];
    return _mm512_loadu_ps(values);
  }

  PBE_WINDOWS PBE_INLINE __m512 sum(const In* in, const Plane& plane) const {
    __m512 value =
        _mm512_add_ps(_mm512_mul_ps(weight.a, taps_at(in)), _mm512_mul_ps(weight.b, taps_at(in + plane.right)));
    value = _mm512_add_ps(value, _mm512_mul_ps(weight.c, taps_at(in + plane.down)));
    return _mm512_add_ps(value, _mm512_mul_ps(weight.d, taps_at(in + plane.down + plane.right)));
  }
};

// One block in all planes.
template <DType Out, bool HasBf16, class In, class Block>
PBE_WINDOWS PBE_INLINE void sample_block(const Stack<In>& stack, const Plane& plane, const Block& block,
                                         std::int64_t i) {
  for (std::int64_t k = 0; k < stack.count; ++k) {
    __m512 value = block.sum(stack.in + k * stack.in_stride, plane);
    if (stack.affine.scale != nullptr) {
      const std::int64_t at = stack.affine.first(k, i);
      value = _mm512_mul_ps(value, _mm512_loadu_ps(stack.affine.scale + at));
      value = _mm512_add_ps(value, _mm512_loadu_ps(stack.affine.shift + at));
    }
    void* out = advance(stack.out, k * stack.out_stride + i, Out);
    if (Out == DType::f32 && stack.streamed) {
      _mm512_stream_ps(static_cast<float*>(out), value);
    } else {
      store<Out, HasBf16>(out, value, first_lanes(kLanes));
    }
  }
}

template <DType Out, bool HasBf16>
PBE_WINDOWS PBE_INLINE void sample_window(const Stack<std::uint8_t>& stack, const Plane& plane, const Taps& taps,
                                          const Window& window, const std::uint8_t* places, std::int64_t i) {
  sample_block<Out, HasBf16>(stack, plane, ByteBlock(plane, taps, window, places, i), i);
}

template <DType Out, bool HasBf16>
PBE_WINDOWS PBE_INLINE void sample_window(const Stack<float>& stack, const Plane& plane, const Taps& taps,
                                          const Window& window, const std::uint8_t* places, std::int64_t i) {
  const auto with = [&](auto rows) PBE_WINDOWS {
    const FloatBlock<decltype(rows)::value> block(plane, taps, window, places, i);
    sample_block<Out, HasBf16>(stack, plane, block, i);
  };
  switch (window.rows) {
    case 2: return with(std::integral_constant<int, 2>{});
    case 3: return with(std::integral_constant<int, 3>{});
    default: return with(std::integral_constant<int, 4>{});
  }
}

// All whole blocks.
template <class In, DType Out, bool HasBf16>
PBE_WINDOWS void sample_windows(const Stack<In>& stack, const Plane& plane, const Taps& taps, const Window* windows,
                                const std::uint8_t* places) {
  // Copies, which no store can change.
  const Stack<In> s = stack;
  const Plane p = plane;
  const Taps t = taps;
  for (std::int64_t i = 0; i + kBlock <= t.n; i += kBlock, ++windows) {
    if (windows->rows > 0) {
      sample_window<Out, HasBf16>(s, p, t, *windows, places, i);
    } else {
      sample_block<Out, HasBf16>(s, p, LooseBlock<In>(t, i), i);
    }
  }
  if (s.streamed) _mm_sfence();
}

template <class In>
using Loop = void (*)(const Stack<In>&, const Plane&, const Taps&, const Window*, const std::uint8_t*);

template <class In>
Loop<In> loop_for(DType out, bool has_bf16) {
  switch (out) {
    case DType::f32: return sample_windows<In, DType::f32, false>;
    case DType::f16: return sample_windows<In, DType::f16, false>;
    case DType::bf16: return has_bf16 ? sample_windows<In, DType::bf16, true> : sample_windows<In, DType::bf16, false>;
    default: return sample_windows<In, DType::u8, false>;
  }
}

}  // namespace pbe::warp::avx512
#endif
