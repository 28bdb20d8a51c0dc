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
PBE_INLINE void sample_each(const In* plane, const Plane& shape, const Taps& taps, std::int64_t begin, std::int64_t end,
                            float* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    const In* tap = plane + taps.offset[i];
    out[i] = weighted(taps, i, tap[0], tap[shape.right], tap[shape.down], tap[shape.down + shape.right]);
  }
}

// Two taps that are neighbours in memory come with one load, and the arithmetic after the loads is vectorised.
PBE_CLONES void sample_pairs(const float* plane, const Plane& shape, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  float upper[2 * kPiece], lower[2 * kPiece];
  for (; begin < end; begin += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const float* tap = plane + taps.offset[begin + i];
      std::memcpy(upper + 2 * i, tap, 2 * sizeof(float));
      std::memcpy(lower + 2 * i, tap + shape.down, 2 * sizeof(float));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      out[begin + i] = weighted(taps, begin + i, upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]);
    }
  }
}

PBE_CLONES void sample_pairs(const std::uint8_t* plane, const Plane& shape, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  std::uint8_t quads[4 * kPiece];
  for (; begin < end; begin += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* tap = plane + taps.offset[begin + i];
      std::memcpy(quads + 4 * i, tap, 2);
      std::memcpy(quads + 4 * i + 2, tap + shape.down, 2);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* quad = quads + 4 * i;
      out[begin + i] = weighted(taps, begin + i, quad[0], quad[1], quad[2], quad[3]);
    }
  }
}

template <class In>
void sample_loads(const In* plane, const Plane& shape, const Taps& taps, std::int64_t begin, std::int64_t end,
                  float* out) {
  if (shape.right == 1) {
    sample_pairs(plane, shape, taps, begin, end, out);
  } else {
    sample_each(plane, shape, taps, begin, end, out);
  }
}

#ifdef PBE_WINDOWS

PBE_WINDOWS PBE_INLINE void store_weighted(const Taps& taps, std::int64_t i, __m512 a, __m512 b, __m512 c, __m512 d,
                                           float* out) {
  __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(taps.weight[0] + i), a);
  sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(taps.weight[1] + i), b));
  sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(taps.weight[2] + i), c));
  sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(taps.weight[3] + i), d));
  _mm512_storeu_ps(out + i, sum);
}

// Rows is a constant so that the loop over rows unrolls into registers.
template <int Rows>
PBE_WINDOWS PBE_INLINE void sample_window(const float* base, const Plane& shape, const Taps& taps, std::int64_t i,
                                          const std::uint8_t* places, float* out) {
  const __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places + i)));
  const __m512i row_of = _mm512_srli_epi32(place, 5);
  // The permutation looks at the low five bits only: the column.
  const __m512i right_place = _mm512_add_epi32(place, _mm512_set1_epi32(shape.right));
  __m512 left[Rows], right[Rows];
  for (int row = 0; row < Rows; ++row) {
    const float* at = base + static_cast<std::int64_t>(row) * shape.row;
    const __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + 16);
    left[row] = _mm512_permutex2var_ps(first, place, second);
    right[row] = _mm512_permutex2var_ps(first, right_place, second);
  }
  constexpr int last = Rows - 1;
  __m512 a = left[0], b = right[0], c = left[std::min(1, last)], d = right[std::min(1, last)];
  for (int row = 1; row < last; ++row) {
    const __mmask16 here = _mm512_cmpeq_epi32_mask(row_of, _mm512_set1_epi32(row));
    a = _mm512_mask_mov_ps(a, here, left[row]);
    b = _mm512_mask_mov_ps(b, here, right[row]);
    c = _mm512_mask_mov_ps(c, here, left[row + 1]);
    d = _mm512_mask_mov_ps(d, here, right[row + 1]);
  }
  store_weighted(taps, i, a, b, c, d, out);
}

PBE_WINDOWS void sample_windows(const float* plane, const Plane& shape, const Taps& taps, const Window* windows,
                                const std::uint8_t* places, float* out) {
  for (std::int64_t i = 0; i + kBlock <= taps.n; i += kBlock, ++windows) {
    const float* base = plane + windows->base;
    switch (windows->rows) {
      case 1: sample_window<1>(base, shape, taps, i, places, out); break;
      case 2: sample_window<2>(base, shape, taps, i, places, out); break;
      case 3: sample_window<3>(base, shape, taps, i, places, out); break;
      case 4: sample_window<4>(base, shape, taps, i, places, out); break;
      default: sample_each(plane, shape, taps, i, i + kBlock, out);
    }
  }
}

PBE_WINDOWS PBE_INLINE __m512 channel_of(__m512i quads, int index) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(quads, 8 * index), _mm512_set1_epi32(255)));
}

// Rows past the last one are that one again: a window may lie at the end of the memory.
PBE_WINDOWS PBE_INLINE __m512i two_rows(const std::uint8_t* base, std::int64_t row_size, int row, int last) {
  const std::uint8_t* first = base + std::min(row, last) * row_size;
  const std::uint8_t* second = base + std::min(row + 1, last) * row_size;
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
}

PBE_WINDOWS void sample_windows(const std::uint8_t* plane, const Plane& shape, const Taps& taps, const Window* windows,
                                const std::uint8_t* places, float* out) {
  const std::uint32_t down = shape.down > 0 ? kColumns : 0;
  // From the place of the top left tap to those of all four, which end up in the four bytes of a 32-bit lane.
  const auto right = static_cast<std::uint32_t>(shape.right);
  const __m512i steps = _mm512_set1_epi32(static_cast<int>((down + right) << 24 | down << 16 | right << 8));
  const __m512i ones = _mm512_set1_epi32(0x01010101);
  for (std::int64_t i = 0; i + kBlock <= taps.n; i += kBlock, ++windows) {
    if (windows->rows == 0) {
      sample_each(plane, shape, taps, i, i + kBlock, out);
      continue;
    }
    const __m512i upper = two_rows(plane + windows->base, shape.row, 0, windows->rows - 1);
    const __m512i lower = two_rows(plane + windows->base, shape.row, 2, windows->rows - 1);
    const __m512i place = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places + i)));
    const __m512i all = _mm512_add_epi8(_mm512_mullo_epi32(place, ones), steps);
    const __m512i quads = _mm512_permutex2var_epi8(upper, all, lower);
    store_weighted(taps, i, channel_of(quads, 0), channel_of(quads, 1), channel_of(quads, 2), channel_of(quads, 3),
                   out);
  }
}

#endif

template <class In>
void sample_any(const In* plane, const Plane& shape, const Taps& taps, const Window* windows,
                const std::uint8_t* places, float* out) {
  std::int64_t done = 0;
#ifdef PBE_WINDOWS
  if (windows != nullptr) {
    sample_windows(plane, shape, taps, windows, places, out);
    done = taps.n / kBlock * kBlock;
  }
#endif
  if (done < taps.n) sample_loads(plane, shape, taps, done, taps.n, out);
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

PBE_CLONES void find_windows(const Taps& taps, const Plane& plane, Window* windows, std::uint8_t* places) {
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
    const std::int64_t latest = plane.size - kColumns - static_cast<std::int64_t>(rows - 1) * plane.row;
    const std::int64_t shift = std::max<std::int64_t>(base - latest, 0);
    const bool fits = rows <= 4 && latest >= 0 && right + plane.right - left + shift < kColumns;
    windows[block] = {static_cast<std::int32_t>(base - shift), fits ? rows : 0};
    const std::int32_t start = left - static_cast<std::int32_t>(shift);
    for (std::int64_t i = 0; i < kBlock; ++i) {
      places[block * kBlock + i] = static_cast<std::uint8_t>((y[i] - top) * kColumns + x[i] - start);
    }
  }
}

void sample(const float* plane, const Plane& shape, const Taps& taps, const Window* windows, const std::uint8_t* places,
            float* out) {
  sample_any(plane, shape, taps, windows, places, out);
}

void sample(const std::uint8_t* plane, const Plane& shape, const Taps& taps, const Window* windows,
            const std::uint8_t* places, float* out) {
  sample_any(plane, shape, taps, windows, places, out);
}

}  // namespace pbe::warp
