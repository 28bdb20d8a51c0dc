// relu(scale x + shift) of channels_last bfloat16 images on the CPU, and its gradient; reference.py is the definition.
#pragma once

#include <cstdint>

namespace pbe::affine_relu {

// Whether this processor has the instructions (level bf16); without them `run` and `backward` must not be called.
bool is_supported();

// x, grad, out: (pixels, channels) bfloat16; scale, shift: (channels,). `out` may be `x` or `grad`.
void run(const std::uint16_t* x, const float* scale, const float* shift, std::uint16_t* out, std::int64_t pixels,
         std::int64_t channels, int threads);

// scale grad where y > 0.
void backward(const std::uint16_t* grad, const std::uint16_t* y, const float* scale, std::uint16_t* out,
              std::int64_t pixels, std::int64_t channels, int threads);

}  // namespace pbe::affine_relu
