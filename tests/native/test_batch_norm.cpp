#include <cmath>

#include "batch_norm/native.h"
#include "check.h"

namespace op = pbe::batch_norm;

namespace {

// Random elements of a type in a buffer of their size, and whether all of one are numbers.
struct Elements {
  Elements(pbe::DType type, std::int64_t n, unsigned seed) : type(type), n(n), data(buffer<char>(n * size_of(type))) {
    const auto values = uniform(n, -1.0f, 1.0f, seed);
    narrow(values.get(), data.get(), type, n);
  }

  bool all_finite() const {
    const auto values = buffer<float>(n);
    widen(data.get(), type, values.get(), n);
    for (std::int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(values[i])) return false;
    }
    return true;
  }

  pbe::DType type;
  std::int64_t n;
  std::unique_ptr<char[]> data;
};

}  // namespace

TEST(batch_norm_stays_inside_its_buffers) {
  if (!op::is_supported()) return;
  for (const pbe::DType type : {pbe::DType::f32, pbe::DType::bf16}) {
    for (const std::int64_t channels : {0, 1, 16, 33, 700}) {
      for (const std::int64_t pixels : {0, 2, 255, 257, 1030}) {
        const std::int64_t n = pixels * channels;
        const Elements x(type, n, 1), grad(type, n, 2), y(type, n, 3), grad_x(type, n, 4), beside(type, n, 7);
        const auto weight = uniform(channels, 0.5f, 1.0f, 5), bias = uniform(channels, -1.0f, 1.0f, 6);
        const auto mean = buffer<float>(channels), variance = buffer<float>(channels);
        const auto grad_weight = buffer<float>(channels), grad_bias = buffer<float>(channels);
        for (int variant = 0; variant < 8; ++variant) {
          const op::Job job{type,
                            pixels,
                            channels,
                            x.data.get(),
                            variant & 1 ? weight.get() : nullptr,
                            variant & 1 ? bias.get() : nullptr,
                            1e-5,
                            (variant & 2) != 0};
          op::forward(job, y.data.get(), mean.get(), variance.get(), 3);
          op::backward(job, grad.data.get(), variant & 4 ? beside.data.get() : nullptr, mean.get(), variance.get(),
                       grad_x.data.get(), grad_weight.get(), grad_bias.get(), 3);
          CHECK(y.all_finite() && grad_x.all_finite());
        }
      }
    }
  }
}
