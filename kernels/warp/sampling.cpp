#include "sampling.h"

#include <algorithm>
#include <cstring>

#include "clones.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifndef __clang__
// gcc's own headers declare "undefined" registers in a way that it then warns of (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#define PBE_WINDOWS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")))
#endif

namespace pbe::warp {
namespace {

// One call of the loops below.
constexpr std::int64_t kPiece = 256;

PBE_INLINE float weighted(const Taps& taps, std::int64_t i, float a, float b, float c, float d) {
  return ((taps.weight[0][i] * a + taps.weight[1][i] * b) + taps.weight[2][i] * c) + taps.weight[3][i] * d;
}

template <class In>
PBE_INLINE void sample_each(const In* in, const Plane& plane, const Taps& taps, std::int64_t begin, std::int64_t end,
                            float* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    const In* tap = in + taps.offset[i];
    out[i] = weighted(taps, i, tap[0], tap[plane.right], tap[plane.down], tap[plane.down + plane.right]);
  }
}

// Two taps that are neighbours in memory come with one load, and the arithmetic after the loads is vectorised.
PBE_CLONES void sample_pairs(const float* in, const Plane& plane, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  float upper[2 * kPiece], lower[2 * kPiece];
  for (; begin < end; begin += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const float* tap = in + taps.offset[begin + i];
      std::memcpy(upper + 2 * i, tap, 2 * sizeof(float));
      std::memcpy(lower + 2 * i, tap + plane.down, 2 * sizeof(float));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      out[begin + i] = weighted(taps, begin + i, upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]);
    }
  }
}

PBE_CLONES void sample_pairs(const std::uint8_t* in, const Plane& plane, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  std::uint8_t quads[4 * kPiece];
  for (; begin < end; begin += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* tap = in + taps.offset[begin + i];
      std::memcpy(quads + 4 * i, tap, 2);
      std::memcpy(quads + 4 * i + 2, tap + plane.down, 2);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* quad = quads + 4 * i;
      out[begin + i] = weighted(taps, begin + i, quad[0], quad[1], quad[2], quad[3]);
    }
  }
}

template <class In>
void sample_loads(const Stack<In>& stack, const Plane& plane, const Taps& taps, std::int64_t begin) {
  for (std::int64_t k = 0; k < stack.count; ++k) {
    const In* in = stack.in + k * stack.in_stride;
    float* out = stack.out + k * stack.out_stride;
    if (plane.right == 1) {
      sample_pairs(in, plane, taps, begin, taps.n, out);
    } else {
      sample_each(in, plane, taps, begin, taps.n, out);
    }
  }
}

#ifdef PBE_WINDOWS

struct Weights {
  __m512 a, b, c, d;
};

PBE_WINDOWS PBE_INLINE Weights weights_at(const Taps& taps, std::int64_t i) {
  return {_mm512_loadu_ps(taps.weight[0] + i), _mm512_loadu_ps(taps.weight[1] + i), _mm512_loadu_ps(taps.weight[2] + i),
          _mm512_loadu_ps(taps.weight[3] + i)};
}

PBE_WINDOWS PBE_INLINE void store_weighted(const Weights& weight, __m512 a, __m512 b, __m512 c, __m512 d, float* out,
                                           bool streamed) {
  __m512 sum = _mm512_mul_ps(weight.a, a);
  sum = _mm512_add_ps(sum, _mm512_mul_ps(weight.b, b));
  sum = _mm512_add_ps(sum, _mm512_mul_ps(weight.c, c));
  sum = _mm512_add_ps(sum, _mm512_mul_ps(weight.d, d));
  if (streamed) {
    _mm512_stream_ps(out, sum);
  } else {
    _mm512_storeu_ps(out, sum);
  }
}

PBE_WINDOWS PBE_INLINE __m512i places_at(const std::uint8_t* places, std::int64_t i) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places + i)));
}

// Rows is a constant so that the loops over rows unroll into registers.
template <int Rows>
PBE_WINDOWS PBE_INLINE void sample_window(const Stack<float>& stack, const Plane& plane, const Taps& taps,
                                          std::int64_t base, const std::uint8_t* places, std::int64_t i) {
  constexpr int last = Rows - 1;
  const Weights weight = weights_at(taps, i);
  // Permutations look at the low five bits only: the column.
  const __m512i place = places_at(places, i);
  const __m512i right_place = _mm512_add_epi32(place, _mm512_set1_epi32(plane.right));
  const __m512i row_of = _mm512_srli_epi32(place, 5);
  __mmask16 here[Rows];
  for (int row = 0; row < Rows; ++row) here[row] = _mm512_cmpeq_epi32_mask(row_of, _mm512_set1_epi32(row));
  for (std::int64_t k = 0; k < stack.count; ++k) {
    const float* at = stack.in + k * stack.in_stride + base;
    __m512 left[Rows], right[Rows];
    for (int row = 0; row < Rows; ++row, at += plane.row) {
      __m512 first = _mm512_loadu_ps(at);
      const __m512 second = _mm512_castps256_ps512(_mm256_loadu_ps(at + 16));
      // A permutation overwrites an operand; without this gcc loads it twice, across cache lines, and not copies it.
      __asm__("" : "+v"(first));
      left[row] = _mm512_permutex2var_ps(first, place, second);
      right[row] = _mm512_permutex2var_ps(first, right_place, second);
    }
    __m512 a = left[0], b = right[0], c = left[std::min(1, last)], d = right[std::min(1, last)];
    for (int row = 1; row < last; ++row) {
      a = _mm512_mask_mov_ps(a, here[row], left[row]);
      b = _mm512_mask_mov_ps(b, here[row], right[row]);
      c = _mm512_mask_mov_ps(c, here[row], left[row + 1]);
      d = _mm512_mask_mov_ps(d, here[row], right[row + 1]);
    }
    store_weighted(weight, a, b, c, d, stack.out + k * stack.out_stride + i, stack.streamed);
  }
}

PBE_WINDOWS PBE_INLINE void sample_window(const Stack<float>& stack, const Plane& plane, const Taps& taps,
                                          const Window& window, const std::uint8_t* places, std::int64_t i) {
  switch (window.rows) {
    case 1: return sample_window<1>(stack, plane, taps, window.base, places, i);
    case 2: return sample_window<2>(stack, plane, taps, window.base, places, i);
    case 3: return sample_window<3>(stack, plane, taps, window.base, places, i);
    default: return sample_window<4>(stack, plane, taps, window.base, places, i);
  }
}

PBE_WINDOWS PBE_INLINE __m512i two_rows(const std::uint8_t* first, const std::uint8_t* second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}

PBE_WINDOWS PBE_INLINE __m512 byte_of(__m512i quads, int index) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(quads, 8 * index), _mm512_set1_epi32(255)));
}

PBE_WINDOWS PBE_INLINE void sample_window(const Stack<std::uint8_t>& stack, const Plane& plane, const Taps& taps,
                                          const Window& window, const std::uint8_t* places, std::int64_t i) {
  const Weights weight = weights_at(taps, i);
  // From the place of the top left tap to those of all four, which end up in the four bytes of a 32-bit lane.
  const std::uint32_t right = static_cast<std::uint32_t>(plane.right), down = plane.down > 0 ? 32 : 0;
  const __m512i steps = _mm512_set1_epi32(static_cast<int>((down + right) << 24 | down << 16 | right << 8));
  const __m512i all = _mm512_add_epi8(_mm512_mullo_epi32(places_at(places, i), _mm512_set1_epi32(0x01010101)), steps);
  // Rows past the last one are that one again: a window may lie at the end of the memory.
  const std::int64_t row1 = std::min(1, window.rows - 1) * static_cast<std::int64_t>(plane.row);
  const std::int64_t row2 = std::min(2, window.rows - 1) * static_cast<std::int64_t>(plane.row);
  const std::int64_t row3 = std::min(3, window.rows - 1) * static_cast<std::int64_t>(plane.row);
  for (std::int64_t k = 0; k < stack.count; ++k) {
    const std::uint8_t* at = stack.in + k * stack.in_stride + window.base;
    const __m512i quads = _mm512_permutex2var_epi8(two_rows(at, at + row1), all, two_rows(at + row2, at + row3));
    store_weighted(weight, byte_of(quads, 0), byte_of(quads, 1), byte_of(quads, 2), byte_of(quads, 3),
                   stack.out + k * stack.out_stride + i, stack.streamed);
  }
}

template <class In>
PBE_WINDOWS void sample_windows(const Stack<In>& stack, const Plane& plane, const Taps& taps, const Window* windows,
                                const std::uint8_t* places) {
  // Copies, which no store can change.
  const Stack<In> s = stack;
  const Plane p = plane;
  const Taps t = taps;
  for (std::int64_t i = 0; i + kBlock <= t.n; i += kBlock, ++windows) {
    if (windows->rows > 0) {
      sample_window(s, p, t, *windows, places, i);
    } else {
      for (std::int64_t k = 0; k < s.count; ++k) {
        sample_each(s.in + k * s.in_stride, p, t, i, i + kBlock, s.out + k * s.out_stride);
      }
    }
  }
  if (s.streamed) _mm_sfence();
}

#endif

template <class In>
void sample_any(const Stack<In>& stack, const Plane& plane, const Taps& taps, const Window* windows,
                const std::uint8_t* places) {
  std::int64_t done = 0;
#ifdef PBE_WINDOWS
  if (windows != nullptr) {
    sample_windows(stack, plane, taps, windows, places);
    done = taps.n / kBlock * kBlock;
  }
#endif
  if (done < taps.n) sample_loads(stack, plane, taps, done);
}

}  // namespace

bool has_windows() {
#ifdef PBE_WINDOWS
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

PBE_CLONES void find_windows(const Taps& taps, const Plane& plane, std::int64_t columns, Window* windows,
                             std::uint8_t* places) {
  const float inverse_row = 1.0f / static_cast<float>(plane.row);
  const std::int32_t more_rows = plane.down > 0 ? 1 : 0;
  for (std::int64_t block = 0; block < taps.n / kBlock; ++block) {
    const std::int32_t* offset = taps.offset + block * kBlock;
    std::int32_t x[kBlock], y[kBlock];
    for (std::int64_t i = 0; i < kBlock; ++i) {
      // A division that vectorises, exact below 2^22 (kLargestPlane).
      y[i] = static_cast<std::int32_t>((static_cast<float>(offset[i]) + 0.5f) * inverse_row);
      x[i] = offset[i] - y[i] * plane.row;
    }
    std::int32_t left = x[0], right = x[0], top = y[0], bottom = y[0];
    for (std::int64_t i = 1; i < kBlock; ++i) {
      left = std::min(left, x[i]);
      right = std::max(right, x[i]);
      top = std::min(top, y[i]);
      bottom = std::max(bottom, y[i]);
    }
    const std::int32_t rows = bottom + more_rows - top + 1;
    // A window must end inside of the plane: at the lower edge it begins further left, in the row before if need be.
    const std::int64_t base = static_cast<std::int64_t>(top) * plane.row + left;
    const std::int64_t latest = plane.size - columns - static_cast<std::int64_t>(rows - 1) * plane.row;
    const std::int64_t shift = std::max<std::int64_t>(base - latest, 0);
    const bool fits = rows <= 4 && latest >= 0 && right + plane.right - left + shift < columns;
    windows[block] = {static_cast<std::int32_t>(base - shift), fits ? rows : 0};
    const std::int32_t start = left - static_cast<std::int32_t>(shift);
    for (std::int64_t i = 0; i < kBlock; ++i) {
      places[block * kBlock + i] = static_cast<std::uint8_t>((y[i] - top) * 32 + x[i] - start);
    }
  }
}

void sample(const Stack<float>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places) {
  sample_any(stack, plane, taps, windows, places);
}

void sample(const Stack<std::uint8_t>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places) {
  sample_any(stack, plane, taps, windows, places);
}

}  // namespace pbe::warp
