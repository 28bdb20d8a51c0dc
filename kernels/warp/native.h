// The warp on the CPU; the formula and its edge cases are in reference.py.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::warp {

struct Images {
  const void* images;
  void* out;      // same layout
  DType in_type;  // f32 or u8
  DType out_type;
  std::int64_t batch, channels, height, width;
  bool channels_last;
  // Per channel, or both null.
  const float* mean;
  const float* std;
};

// One grid for all images, as reference.taps gives it: offsets (pixels), weights (4, pixels). False, with nothing
// written, where an offset would read outside of a plane.
bool run(const Images& images, const std::int32_t* offsets, const float* weights, int threads);

// A grid (height, width, 2) that moves by noise of its own for each image.
void run_noise(const Images& images, const float* grid, float amplitude, const std::int64_t* image_ids,
               std::uint64_t seed, int threads);

}  // namespace pbe::warp
