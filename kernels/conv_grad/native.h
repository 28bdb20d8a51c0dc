// The gradient of the images that a convolution reads, or two convolutions, in bfloat16; reference.py is the
// definition.
#pragma once

#include <cstdint>

namespace pbe::conv_grad {

// Numbers in a register of sums.
constexpr std::int64_t kGroup = 16;

// images: (images, height, width, channels_in) -> outputs: (images, height_out, width_out, channels), kernel x kernel
// taps, stride and padding the same each way; and beside it, with the same stride, 1 x 1 taps without padding.
struct Job {
  const std::uint16_t* grad;         // of the outputs, bfloat16
  const std::uint16_t* mask;         // likewise, or null: where it is not above zero, `grad` counts as zero
  const std::uint16_t* grad_beside;  // of the other convolution's outputs (channels_beside), or null
  const std::uint16_t* packed;       // see reference.py
  std::uint16_t* grad_images;
  std::int64_t images, height, width, channels_in, height_out, width_out, channels, channels_beside;
  std::int64_t kernel, stride, padding;
};

// Whether this processor has the instructions (level bf16); without them `run` may not be called.
bool is_supported();

void run(const Job& job, int threads);

// Numbers in `packed` of such a job.
std::int64_t packed_size(const Job& job);

}  // namespace pbe::conv_grad
