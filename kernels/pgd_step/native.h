// One PGD step on the CPU; the formula and its edge cases are in reference.py.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::pgd_step {

enum class Norm : int { linf = 0, l2 = 1 };

struct Step {
  // float32, in one memory layout; adv_next may be adv.
  const float* adv;
  const float* origin;
  float* adv_next;
  const void* grad;
  void* model_input;  // or null: not wanted
  DType grad_type;
  DType input_type;
  std::int64_t images, channels, pixels;  // pixels = height * width
  bool channels_last;
  // Per channel, or both null: then the model input is adv_next itself and grad is taken as it is.
  const float* mean;
  const float* std;
  float eps, alpha;
  Norm norm;
};

void run(const Step& step, int threads);

}  // namespace pbe::pgd_step
