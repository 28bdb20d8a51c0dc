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

// bfloat16 images (pixels, channels) and scale (channels,); scale and beside may be null.
struct Gradient {
  const std::uint16_t *grad, *y, *beside;
  const float* scale;
  std::uint16_t* out;
};

// out = scale grad where y > 0, plus beside; `out` may be `grad` or `beside`.
void backward(const Gradient& all, std::int64_t pixels, std::int64_t channels, int threads);

}  // namespace pbe::affine_relu
