// Weighted sums of four taps for a stretch of output elements: the inner loops of the warp, behind one call.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::warp {

// A contiguous piece of memory that is sampled on its own: one channel in NCHW, a whole image in channels_last.
struct Plane {
  std::int64_t size;   // elements
  std::int32_t row;    // elements per row of pixels
  std::int32_t right;  // elements to the right-hand tap, 0 where the image is one pixel wide
  std::int32_t down;   // elements to the lower tap, 0 where it is one pixel high
};

// Of n output elements: the offset of the top left tap in the plane, and the weights of the four.
struct Taps {
  const std::int32_t* offset;
  const float* weight;
  std::int64_t weight_stride;  // from one tap's weights to the next one's
  std::int64_t n;
};

// Neighbouring outputs sample from neighbouring places. Where the taps of kBlock outputs lie in two to four rows of so
// many columns, registers hold those rows and permutations of them replace the separate loads.
constexpr std::int64_t kBlock = 16;
template <class In>
constexpr std::int64_t kColumns = sizeof(In) == 1 ? 32 : 24;

struct Window {
  std::int32_t base;  // offset of the first row's first element
  std::int32_t rows;  // 0: the taps lie too far apart, or in a single row
  // From the base to the rows after the first; past the last row it is that one again, as the memory may end there.
  std::int32_t further[3];
};

// Whether this processor has the instructions (AVX-512 with VBMI).
bool has_windows();
// Fills windows (n / kBlock) and places (n): 32 * row + column of each top left tap within its window.
void find_windows(const Taps& taps, const Plane& plane, std::int64_t columns, Window* windows, std::uint8_t* places);
// Takes the windows from blocks with weights outside of [0, 1], which no WarpPlan has: bytes are not multiplied exactly
// with all of them.
void drop_windows(const Taps& taps, Window* windows);

// What becomes of a sum before it is stored: x * scale + shift, or, with scale null, nothing. Each plane has one pair,
// kBlock times in a row; where several channels share a plane, each element has one.
struct Affine {
  const float *scale, *shift;
  bool per_element;

  std::int64_t first(std::int64_t plane, std::int64_t element) const { return per_element ? element : plane * kBlock; }
};

// Several planes that are sampled at the same taps, which are then loaded once.
template <class In>
struct Stack {
  const In* in;
  std::int64_t in_stride;
  void* out;
  std::int64_t out_stride;  // elements
  std::int64_t count;
  DType out_type;
  Affine affine;
  // Write past the caches; whole blocks of out must be aligned to 64 bytes.
  bool streamed;
};

// out[i] = the sum over the four taps, finished and rounded. With windows null, or from the last whole block on, every
// tap is a load, and the sums of one plane lie in `sums` (n) on their way.
void sample(const Stack<float>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places, float* sums);
void sample(const Stack<std::uint8_t>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places, float* sums);

}  // namespace pbe::warp
