// The steps of Winograd's algorithm that are the same for all widths of the products. Callers look at is_supported()
// first.
#pragma once

#include <cstdint>

#include "bf16_avx512.h"
#include "conv3x3/native.h"

#ifdef PBE_X86
namespace pbe::conv3x3 {

using avx512::first_lanes;
using bf16::load;
using bf16::narrow;
using bf16::pair;

// Positions of a transformed 4 x 4 tile.
constexpr int kPositions = 16;

// 0, 16, 1, 17, ...: for interleaved().
struct Interleaving {
  PBE_BF16 Interleaving() {
    alignas(64) std::uint16_t of[2 * kGroup];
    for (int i = 0; i < 2 * kGroup; ++i) of[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * kGroup);
    order = _mm512_load_si512(of);
  }
  __m512i order;
};

// Sixteen pairs of a number of each.
PBE_BF16 PBE_INLINE __m512i interleaved(const Interleaving& by, __m512 first, __m512 second) {
  return _mm512_permutexvar_epi16(by.order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// Images (.., height, width, channels) and their mask, or null.
struct Images {
  const std::uint16_t* data;
  const std::uint16_t* mask;
  std::int64_t height, width, channels;
};

// The four lines of pixels that a row of tiles reads. Rows are counted through all images.
struct Lines {
  Lines(const Images& images, std::int64_t row) : images(images) {
    const std::int64_t down = (images.height + 1) / 2, top = 2 * (row % down) - 1;
    for (int i = 0; i < 4; ++i) {
      inside[i] = top + i >= 0 && top + i < images.height;
      begin[i] = (row / down * images.height + (inside[i] ? top + i : 0)) * images.width * images.channels;
    }
  }

  Images images;
  std::int64_t begin[4];
  bool inside[4];
};

// B^T d of column x of a tile. B^T = [1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1]. What is outside of the image is zero: no
// lane of it is loaded.
template <bool HasMask>
PBE_BF16 PBE_INLINE void column(const Lines& lines, std::int64_t x, std::int64_t channel, __mmask16 lanes,
                                __m512 out[4]) {
  const bool is_inside = x >= 0 && x < lines.images.width;
  const std::int64_t offset = (is_inside ? x : 0) * lines.images.channels + channel;
  __m512 d[4];
  for (int i = 0; i < 4; ++i) {
    const std::int64_t at = lines.begin[i] + offset;
    __mmask16 here = is_inside && lines.inside[i] ? lanes : __mmask16{0};
    if constexpr (HasMask) here = avx512::above_zero(lines.images.mask + at, here);
    d[i] = load(lines.images.data + at, here);
  }
  out[0] = _mm512_sub_ps(d[0], d[2]);
  out[1] = _mm512_add_ps(d[1], d[2]);
  out[2] = _mm512_sub_ps(d[2], d[1]);
  out[3] = _mm512_sub_ps(d[1], d[3]);
}

// The other half of it: (B^T d) B of four columns, one line i of the 4 x 4.
PBE_BF16 PBE_INLINE void line(const __m512 c0[4], const __m512 c1[4], const __m512 c2[4], const __m512 c3[4], int i,
                              __m512 out[4]) {
  out[0] = _mm512_sub_ps(c0[i], c2[i]);
  out[1] = _mm512_add_ps(c1[i], c2[i]);
  out[2] = _mm512_sub_ps(c2[i], c1[i]);
  out[3] = _mm512_sub_ps(c1[i], c3[i]);
}

}  // namespace pbe::conv3x3
#endif
