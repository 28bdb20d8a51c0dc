// relu(scale x + shift) of channels_last images on the CPU, and its gradient; reference.py is the definition.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::affine_relu {

struct Images {
  // f32 or bf16
  DType type;
  std::int64_t pixels, channels;
  // Without it scale x + shift is the result.
  bool relu;
};

// Whether this processor has the instructions (level bf16); without them `run` and `backward` must not be called.
bool is_supported();

// x, out: (pixels, channels); scale, shift: (channels,). `out` may be `x`.
void run(const Images& images, const void* x, const float* scale, const float* shift, void* out, int threads);

// scale grad where y > 0, of bfloat16 images (pixels, channels); `out` may be `grad`.
void backward(const std::uint16_t* grad, const std::uint16_t* y, const float* scale, std::uint16_t* out,
              std::int64_t pixels, std::int64_t channels, int threads);

}  // namespace pbe::affine_relu
