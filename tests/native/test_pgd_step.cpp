#include <algorithm>
#include <cmath>

#include "check.h"
#include "pgd_step/native.h"

using pbe::DType;
using pbe::pgd_step::Norm;
using pbe::pgd_step::Step;

// Values are compared with the reference in Python; here it is the memory that is watched, and the two constraints.
TEST(pgd_step_stays_inside_its_buffers_and_its_ball) {
  struct Shape {
    std::int64_t images, channels, pixels;
  };
  const DType types[] = {DType::f32, DType::f16, DType::bf16};
  for (const Shape& shape : {Shape{0, 3, 4}, Shape{2, 0, 4}, Shape{1, 1, 1}, Shape{3, 1, 63}, Shape{2, 3, 1},
                             Shape{2, 3, 1551}, Shape{1, 5, 1000}, Shape{7, 3, 1024}, Shape{1, 2050, 3}}) {
    const std::int64_t each = shape.channels * shape.pixels, n = shape.images * each;
    for (int variant = 0; variant < 3 * 3 * 2 * 2 * 3; ++variant) {
      const DType grad_type = types[variant % 3], input_type = types[variant / 3 % 3];
      const Norm norm = variant / 9 % 2 ? Norm::l2 : Norm::linf;
      const bool channels_last = variant / 18 % 2;
      const int mode = variant / 36;  // 0: no normalisation, 1: with it, 2: in place and without an input
      const auto origin = uniform(n, 0.0f, 1.0f, 1), start = uniform(n, -0.05f, 0.05f, 2);
      const auto values = uniform(n, -1.0f, 1.0f, 3);
      const auto mean = uniform(shape.channels, 0.0f, 1.0f, 4), std = uniform(shape.channels, 0.1f, 1.0f, 5);
      auto adv = buffer<float>(n), next = buffer<float>(n);
      for (std::int64_t i = 0; i < n; ++i) {
        adv[i] = std::min(std::max(origin[i] + start[i], 0.0f), 1.0f);
        next[i] = NAN;
      }
      auto grad = buffer<std::uint8_t>(n * pbe::size_of(grad_type));
      pbe::narrow(values.get(), grad.get(), grad_type, n);
      auto input = buffer<std::uint8_t>(n * pbe::size_of(input_type));
      float* const out = mode == 2 ? adv.get() : next.get();
      const float eps = 0.06f;
      const Step step{adv.get(),
                      origin.get(),
                      out,
                      grad.get(),
                      mode == 2 ? nullptr : input.get(),
                      grad_type,
                      input_type,
                      shape.images,
                      shape.channels,
                      shape.pixels,
                      channels_last,
                      mode == 0 ? nullptr : mean.get(),
                      mode == 0 ? nullptr : std.get(),
                      eps,
                      0.02f,
                      norm};
      pbe::pgd_step::run(step, 3);
      for (std::int64_t image = 0; image < shape.images; ++image) {
        double length = 0.0;
        for (std::int64_t i = image * each; i < (image + 1) * each; ++i) {
          const double delta = out[i] - origin[i];
          CHECK(out[i] >= 0.0f && out[i] <= 1.0f);
          length = norm == Norm::l2 ? std::hypot(length, delta) : std::max(length, std::abs(delta));
        }
        CHECK(length <= eps + 1e-6);
      }
    }
  }
}
