#include "native.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "levels.h"
#include "linf_avx512.h"
#include "parallel.h"

namespace pbe::pgd_step {
namespace {

// Elements worked on at a time: with their float32 copies of gradient and input they stay in the first-level cache.
constexpr std::int64_t kTile = 2048;
// Under this many elements a second thread costs more than it brings.
constexpr std::int64_t kGrain = 16384;

PBE_INLINE float clamp(float value, float low, float high) {
  // NaN compares false with everything and so passes, as in torch.clamp.
  value = value < low ? low : value;
  return value > high ? high : value;
}

PBE_CLONES void step_linf(const float* adv, const float* origin, const float* grad, float* next, std::int64_t n,
                          float eps, float alpha) {
#pragma omp simd  // adv may be next
  for (std::int64_t i = 0; i < n; ++i) {
    const float sign = static_cast<float>(grad[i] > 0.0f) - static_cast<float>(grad[i] < 0.0f);
    const float delta = adv[i] + alpha * sign - origin[i];
    next[i] = clamp(origin[i] + clamp(delta, -eps, eps), 0.0f, 1.0f);
  }
}

PBE_CLONES void step_l2(const float* adv, const float* origin, const float* grad, float* next, std::int64_t n,
                        float inverse_norm, float alpha, float shrink) {
#pragma omp simd  // adv may be next
  for (std::int64_t i = 0; i < n; ++i) {
    // An image without a step must not multiply a NaN by zero.
    const float direction = inverse_norm > 0.0f ? grad[i] * inverse_norm : 0.0f;
    const float delta = adv[i] + alpha * direction - origin[i];
    next[i] = clamp(origin[i] + shrink * delta, 0.0f, 1.0f);
  }
}

struct Sums {
  double grad_grad = 0.0, grad_delta = 0.0, delta_delta = 0.0;
};

// float64: squares of a saturated model's gradients (1e-25) vanish in float32.
PBE_CLONES void add_sums(const float* adv, const float* origin, const float* grad, std::int64_t n, Sums& sums) {
  double grad_grad = 0.0, grad_delta = 0.0, delta_delta = 0.0;
#pragma omp simd reduction(+ : grad_grad, grad_delta, delta_delta)
  for (std::int64_t i = 0; i < n; ++i) {
    const double g = grad[i];
    const double d = adv[i] - origin[i];
    grad_grad += g * g;
    grad_delta += g * d;
    delta_delta += d * d;
  }
  sums.grad_grad += grad_grad;
  sums.grad_delta += grad_delta;
  sums.delta_delta += delta_delta;
}

PBE_CLONES void scale_by(float* values, std::int64_t n, const float* factor) {
  for (std::int64_t i = 0; i < n; ++i) values[i] *= factor[i];
}

PBE_CLONES void scale_by(float* values, std::int64_t n, float factor) {
  for (std::int64_t i = 0; i < n; ++i) values[i] *= factor;
}

PBE_CLONES void normalise(const float* in, float* out, std::int64_t n, const float* mean, const float* inverse_std) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = (in[i] - mean[i]) * inverse_std[i];
}

PBE_CLONES void normalise(const float* in, float* out, std::int64_t n, float mean, float inverse_std) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = (in[i] - mean) * inverse_std;
}

// Mean and 1/std for any stretch of memory: one pair per plane in NCHW, a repeating row of pairs in channels_last.
struct Affine {
  std::vector<float> mean, inverse_std;
  std::int64_t channels, plane;  // plane: elements that share one pair; 1 in channels_last
  std::int64_t tile;

  explicit Affine(const Step& step) : channels(step.channels), plane(step.channels_last ? 1 : step.pixels) {
    const std::int64_t periods = plane > 1 ? 1 : (kTile + channels - 1) / channels;
    tile = plane > 1 ? kTile : periods * channels;
    if (step.mean == nullptr) return;
    mean.assign(step.mean, step.mean + channels);
    for (std::int64_t c = 0; c < channels; ++c) inverse_std.push_back(1.0f / step.std[c]);
    // The row over and over. To divide anew for each element would take as long as the step of a few images.
    mean.resize(static_cast<std::size_t>(periods * channels));
    inverse_std.resize(mean.size());
    for (std::size_t i = static_cast<std::size_t>(channels); i < mean.size(); ++i) {
      mean[i] = mean[i - channels];
      inverse_std[i] = inverse_std[i - channels];
    }
  }
  bool used() const { return !mean.empty(); }

  // The end of the stretch from `at` that one call of the loops above can take.
  std::int64_t end_of_tile(std::int64_t at, std::int64_t end) const {
    if (!used()) return std::min(end, at + kTile);
    const std::int64_t unit = plane > 1 ? plane : tile;
    return std::min({end, at + tile, at / unit * unit + unit});
  }
  std::int64_t first(std::int64_t at) const { return plane > 1 ? at / plane % channels : at % tile; }
};

class Worker {
 public:
  Worker(const Step& step, const Affine& affine)
      : step_(step), affine_(affine), grad_(affine.tile), input_(affine.tile) {}

  void linf(std::int64_t begin, std::int64_t end) {
#ifdef PBE_X86
    if (level() >= Level::avx512) return linf_fused(begin, end);
#endif
    for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
      step_linf(step_.adv + at, step_.origin + at, gradient(at, n), step_.adv_next + at, n, step_.eps, step_.alpha);
      store_input(at, n);
    });
  }

  void l2(std::int64_t begin, std::int64_t end) {
    Sums sums;
    for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
      add_sums(step_.adv + at, step_.origin + at, pixel_gradient(at, n), n, sums);
    });
    // Outside of these powers of two the norm or its inverse is no normal float32: no step.
    const double norm = std::sqrt(sums.grad_grad);
    const bool steps = norm >= 0x1p-126 && norm <= 0x1p126;
    const double alpha = steps ? static_cast<double>(step_.alpha) : 0.0;
    const double along = steps ? sums.grad_delta / norm : 0.0;
    const double length = std::sqrt(std::max(sums.delta_delta + 2.0 * alpha * along + alpha * alpha, 0.0));
    const float shrink = length > step_.eps ? static_cast<float>(step_.eps / length) : 1.0f;
    const float inverse_norm = steps ? static_cast<float>(1.0 / norm) : 0.0f;
    for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
      step_l2(step_.adv + at, step_.origin + at, pixel_gradient(at, n), step_.adv_next + at, n, inverse_norm,
              step_.alpha, shrink);
      store_input(at, n);
    });
  }

 private:
#ifdef PBE_X86
  void linf_fused(std::int64_t begin, std::int64_t end) const {
    const bool wants_input = step_.model_input != nullptr;
    const auto affine = !affine_.used()     ? avx512::Affine::none
                        : affine_.plane > 1 ? avx512::Affine::one
                                            : avx512::Affine::each;
    const avx512::Loop loop = avx512::loop_for(step_.grad_type, wants_input ? step_.input_type : avx512::kNoInput,
                                               affine, level() >= Level::bf16);
    for_tiles(begin, end, [&](std::int64_t at, std::int64_t n) {
      const std::int64_t first = affine_.used() ? affine_.first(at) : 0;
      loop({step_.adv + at, step_.origin + at, advance(step_.grad, at, step_.grad_type), step_.adv_next + at,
            wants_input ? advance(step_.model_input, at, step_.input_type) : nullptr, n, step_.eps, step_.alpha,
            affine_.mean.data() + first, affine_.inverse_std.data() + first});
    });
  }
#endif

  template <class Body>
  void for_tiles(std::int64_t begin, std::int64_t end, const Body& body) const {
    for (std::int64_t at = begin; at < end;) {
      const std::int64_t next = affine_.end_of_tile(at, end);
      body(at, next - at);
      at = next;
    }
  }

  // The gradient as float32; a copy only where it is something else.
  const float* gradient(std::int64_t at, std::int64_t n) {
    if (step_.grad_type == DType::f32) return static_cast<const float*>(step_.grad) + at;
    widen(advance(step_.grad, at, step_.grad_type), step_.grad_type, grad_.data(), n);
    return grad_.data();
  }

  // The gradient with respect to pixels: the chain rule divides by std. The sign alone does not need it.
  const float* pixel_gradient(std::int64_t at, std::int64_t n) {
    if (!affine_.used()) return gradient(at, n);
    widen(advance(step_.grad, at, step_.grad_type), step_.grad_type, grad_.data(), n);
    const float* inverse_std = affine_.inverse_std.data() + affine_.first(at);
    if (affine_.plane > 1) {
      scale_by(grad_.data(), n, *inverse_std);
    } else {
      scale_by(grad_.data(), n, inverse_std);
    }
    return grad_.data();
  }

  void store_input(std::int64_t at, std::int64_t n) {
    if (step_.model_input == nullptr) return;
    const float* next = step_.adv_next + at;
    void* out = advance(step_.model_input, at, step_.input_type);
    if (!affine_.used()) return narrow(next, out, step_.input_type, n);
    const std::int64_t first = affine_.first(at);
    float* row = step_.input_type == DType::f32 ? static_cast<float*>(out) : input_.data();
    if (affine_.plane > 1) {
      normalise(next, row, n, affine_.mean[first], affine_.inverse_std[first]);
    } else {
      normalise(next, row, n, affine_.mean.data() + first, affine_.inverse_std.data() + first);
    }
    if (row != out) narrow(row, out, step_.input_type, n);
  }

  const Step& step_;
  const Affine& affine_;
  std::vector<float> grad_, input_;
};

}  // namespace

void run(const Step& step, int threads) {
  const std::int64_t per_image = step.channels * step.pixels;
  if (step.images == 0 || per_image == 0) return;
  const Affine affine(step);
  if (step.norm == Norm::linf) {
    parallel_for(step.images * per_image, kGrain, threads,
                 [&](std::int64_t begin, std::int64_t end) { Worker(step, affine).linf(begin, end); });
    return;
  }
  const std::int64_t grain = std::max<std::int64_t>(kGrain / per_image, 1);
  parallel_for(step.images, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    Worker worker(step, affine);
    for (std::int64_t image = begin; image < end; ++image) worker.l2(image * per_image, (image + 1) * per_image);
  });
}

}  // namespace pbe::pgd_step
