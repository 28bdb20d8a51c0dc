// Batch normalisation in training, and the ReLU after it, of pixels whose channels lie side by side.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::batch_norm {

struct Job {
  // Of x, of the result, and of their gradients: f32 or bf16.
  DType type;
  std::int64_t pixels, channels;
  const void* x;
  // One per channel; without them ones and zeros.
  const float *weight, *bias;
  double eps;
  bool relu;
};

// Whether the processor has the instructions for it: AVX512-BF16.
bool is_supported();

// y = relu(weight (x - mean) / sqrt(variance + eps) + bias), with the mean and the biased variance of every channel.
void forward(const Job& job, void* y, float* mean, float* variance, int threads);

// The gradients of x, weight and bias from that of y, the forward pass's statistics in hand. To that of x `beside` is
// added, where it is not null.
void backward(const Job& job, const void* grad, const void* beside, const float* mean, const float* variance,
              void* grad_x, float* grad_weight, float* grad_bias, int threads);

}  // namespace pbe::batch_norm
