#include "batch_norm/native.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "affine_relu/native.h"
#include "avx512.h"
#include "parallel.h"

namespace pbe::batch_norm {

#ifdef PBE_X86
namespace {

using namespace pbe::avx512;

// Elements of a block of pixels, whose sums are in float32 before they go into one in float64. They stay in the first
// cache, so that a second look at them is free; at a power of two of channels fewer would fit than its size says.
constexpr std::int64_t kBlock = 8192;
constexpr std::int64_t kFewestPixels = 32;
// Elements per thread at least.
constexpr std::int64_t kGrain = 1 << 15;

std::int64_t block_pixels(const Job& job) { return std::max(kFewestPixels, kBlock / job.channels); }

std::int64_t blocks_of(const Job& job) { return (job.pixels + block_pixels(job) - 1) / block_pixels(job); }

// Some channels of a block of pixels.
struct Block {
  template <DType Type>
  static Block of(const void* data, std::int64_t index, std::int64_t channel, const Job& job) {
    const std::int64_t most = block_pixels(job), first = index * most;
    return {static_cast<const char*>(advance(data, first * job.channels + channel, Type)),
            std::min(most, job.pixels - first), job.channels * size_of(Type)};
  }

  const void* at(std::int64_t pixel) const { return data + pixel * stride; }

  const char* data;
  std::int64_t pixels, stride;
};

// What is summed over the pixels, of which there may be two.
struct Sums {
  __m512 first, second;
};

// Calls add(pixel, sums) for all pixels. Four sums at a time: one alone would wait for its last addition.
template <class Add>
PBE_AVX512 PBE_INLINE Sums sums_over(std::int64_t pixels, const Add& add) {
  const __m512 zero = _mm512_setzero_ps();
  Sums sums[4] = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
  std::int64_t pixel = 0;
  for (; pixel + 4 <= pixels; pixel += 4) {
    for (int i = 0; i < 4; ++i) add(pixel + i, sums[i]);
  }
  for (; pixel < pixels; ++pixel) add(pixel, sums[0]);
  const auto total = [&](__m512 Sums::* of) PBE_AVX512 {
    return _mm512_add_ps(_mm512_add_ps(sums[0].*of, sums[1].*of), _mm512_add_ps(sums[2].*of, sums[3].*of));
  };
  return {total(&Sums::first), total(&Sums::second)};
}

// Mean, and sum of the squares about it: the square of a large mean would swallow a small variance.
template <DType Type>
PBE_AVX512 void block_statistics(const Job& job, std::int64_t index, float* mean, float* squares) {
  for (std::int64_t channel = 0; channel < job.channels; channel += kLanes) {
    const __mmask16 lanes = first_lanes(job.channels - channel);
    const Block x = Block::of<Type>(job.x, index, channel, job);
    const Sums sum = sums_over(x.pixels, [&](std::int64_t pixel, Sums& so_far) PBE_AVX512 {
      so_far.first = _mm512_add_ps(so_far.first, load<Type>(x.at(pixel), lanes));
    });
    const __m512 centre = _mm512_mul_ps(sum.first, _mm512_set1_ps(1.0f / static_cast<float>(x.pixels)));
    const Sums square = sums_over(x.pixels, [&](std::int64_t pixel, Sums& so_far) PBE_AVX512 {
      const __m512 away = _mm512_sub_ps(load<Type>(x.at(pixel), lanes), centre);
      so_far.first = _mm512_fmadd_ps(away, away, so_far.first);
    });
    store<DType::f32, true>(mean + channel, centre, lanes);
    store<DType::f32, true>(squares + channel, square.first, lanes);
  }
}

// The gradient of y, and the constants per channel that say where the ReLU let y through.
struct Gradient {
  const void* of_y;
  // Of the other reader of x, or null.
  const void* beside;
  const float *mean, *scale, *shift;
};

struct Lanes {
  PBE_AVX512 PBE_INLINE Lanes(const Gradient& gradient, std::int64_t channel, __mmask16 lanes)
      : mean(load<DType::f32>(gradient.mean + channel, lanes)),
        scale(load<DType::f32>(gradient.scale + channel, lanes)),
        shift(load<DType::f32>(gradient.shift + channel, lanes)) {}

  __m512 mean, scale, shift;
};

// Where y is not a number the gradient passes, as in torch.relu's.
template <bool Relu>
PBE_AVX512 PBE_INLINE __m512 let_through(__m512 grad, __m512 x, const Lanes& channels) {
  if constexpr (!Relu) return grad;
  const __m512 y = _mm512_fmadd_ps(x, channels.scale, channels.shift);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), grad);
}

// Sums over g, the gradient that is let through, and over g (x - mean).
template <DType Type, bool Relu>
PBE_AVX512 void block_sums(const Job& job, const Gradient& gradient, std::int64_t index, float* sum, float* product) {
  for (std::int64_t channel = 0; channel < job.channels; channel += kLanes) {
    const __mmask16 lanes = first_lanes(job.channels - channel);
    const Lanes channels(gradient, channel, lanes);
    const Block x = Block::of<Type>(job.x, index, channel, job);
    const Block grad = Block::of<Type>(gradient.of_y, index, channel, job);
    const Sums sums = sums_over(x.pixels, [&](std::int64_t pixel, Sums& so_far) PBE_AVX512 {
      const __m512 value = load<Type>(x.at(pixel), lanes);
      const __m512 g = let_through<Relu>(load<Type>(grad.at(pixel), lanes), value, channels);
      so_far.first = _mm512_add_ps(so_far.first, g);
      so_far.second = _mm512_fmadd_ps(g, _mm512_sub_ps(value, channels.mean), so_far.second);
    });
    store<DType::f32, true>(sum + channel, sums.first, lanes);
    store<DType::f32, true>(product + channel, sums.second, lanes);
  }
}

// scale (g - offset - slope (x - mean)) + beside
template <DType Type, bool Relu, bool Beside>
PBE_AVX512 void block_gradient(const Job& job, const Gradient& gradient, std::int64_t index, const float* offset,
                               const float* slope, void* out) {
  for (std::int64_t channel = 0; channel < job.channels; channel += kLanes) {
    const __mmask16 lanes = first_lanes(job.channels - channel);
    const Lanes channels(gradient, channel, lanes);
    const __m512 offsets = _mm512_mul_ps(channels.scale, load<DType::f32>(offset + channel, lanes));
    const __m512 slopes = _mm512_mul_ps(channels.scale, load<DType::f32>(slope + channel, lanes));
    const Block x = Block::of<Type>(job.x, index, channel, job);
    const Block grad = Block::of<Type>(gradient.of_y, index, channel, job);
    const Block beside = Block::of<Type>(Beside ? gradient.beside : gradient.of_y, index, channel, job);
    char* to = static_cast<char*>(advance(out, index * block_pixels(job) * job.channels + channel, Type));
    for (std::int64_t pixel = 0; pixel < x.pixels; ++pixel, to += x.stride) {
      const __m512 value = load<Type>(x.at(pixel), lanes);
      const __m512 g = let_through<Relu>(load<Type>(grad.at(pixel), lanes), value, channels);
      __m512 rest = _mm512_fmadd_ps(slopes, _mm512_sub_ps(value, channels.mean), offsets);
      if constexpr (Beside) rest = _mm512_sub_ps(rest, load<Type>(beside.at(pixel), lanes));
      store<Type, true>(to, _mm512_fmsub_ps(channels.scale, g, rest), lanes);
    }
  }
}

// One value per block and channel.
class Partial {
 public:
  explicit Partial(const Job& job)
      : channels_(job.channels), values_(static_cast<std::size_t>(blocks_of(job) * job.channels)) {}

  float* of(std::int64_t block) { return values_.data() + block * channels_; }

  // Sums of term(block, channel, value) per channel, in the order of the blocks: the number of threads is no matter.
  template <class Term>
  PBE_AVX512 std::vector<double> sum(const Term& term) const {
    std::vector<double> sums(channels_, 0.0);
    const std::int64_t count = static_cast<std::int64_t>(values_.size());
    for (std::int64_t first = 0, block = 0; first < count; first += channels_, ++block) {
      for (std::int64_t c = 0; c < channels_; ++c) sums[c] += term(block, c, static_cast<double>(values_[first + c]));
    }
    return sums;
  }

  std::vector<double> sum() const {
    return sum([](std::int64_t, std::int64_t, double value) { return value; });
  }

 private:
  std::int64_t channels_;
  std::vector<float> values_;
};

template <class Body>
void over_blocks(const Job& job, int threads, const Body& body) {
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / (block_pixels(job) * job.channels));
  parallel_for(blocks_of(job), grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) body(block);
  });
}

template <DType Type>
void statistics(const Job& job, float* mean, float* variance, int threads) {
  Partial means(job), squares(job);
  over_blocks(job, threads,
              [&](std::int64_t block) { block_statistics<Type>(job, block, means.of(block), squares.of(block)); });
  const auto pixels = static_cast<double>(job.pixels);
  const std::int64_t most = block_pixels(job);
  const auto in_block = [&](std::int64_t block) {
    return static_cast<double>(std::min(most, job.pixels - block * most));
  };
  std::vector<double> mean_of =
      means.sum([&](std::int64_t block, std::int64_t, double value) { return value * in_block(block) / pixels; });
  const std::vector<double> within = squares.sum();
  const std::vector<double> between = means.sum([&](std::int64_t block, std::int64_t c, double value) {
    return (value - mean_of[c]) * (value - mean_of[c]) * in_block(block);
  });
  for (std::int64_t c = 0; c < job.channels; ++c) {
    mean[c] = static_cast<float>(mean_of[c]);
    variance[c] = static_cast<float>((within[c] + between[c]) / pixels);
  }
}

double inverse_deviation(const Job& job, float variance) {
  return 1.0 / std::sqrt(static_cast<double>(variance) + job.eps);
}

// y = scale x + shift.
struct Affine {
  Affine(const Job& job, const float* mean, const float* variance) : scale(job.channels), shift(job.channels) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
      const double factor = inverse_deviation(job, variance[c]) * (job.weight != nullptr ? job.weight[c] : 1.0);
      scale[c] = static_cast<float>(factor);
      shift[c] = static_cast<float>((job.bias != nullptr ? job.bias[c] : 0.0) - mean[c] * factor);
    }
  }

  std::vector<float> scale, shift;
};

template <DType Type, bool Relu>
void backward(const Job& job, const Gradient& gradient, const float* variance, void* grad_x, float* grad_weight,
              float* grad_bias, int threads) {
  Partial sums(job), products(job);
  over_blocks(job, threads, [&](std::int64_t block) {
    block_sums<Type, Relu>(job, gradient, block, sums.of(block), products.of(block));
  });
  const std::vector<double> sum = sums.sum(), product = products.sum();
  std::vector<float> offset(job.channels), slope(job.channels);
  const auto pixels = static_cast<double>(job.pixels);
  for (std::int64_t c = 0; c < job.channels; ++c) {
    const double inverse = inverse_deviation(job, variance[c]);
    grad_weight[c] = static_cast<float>(product[c] * inverse);
    grad_bias[c] = static_cast<float>(sum[c]);
    offset[c] = static_cast<float>(sum[c] / pixels);
    slope[c] = static_cast<float>(product[c] * inverse * inverse / pixels);
  }
  over_blocks(job, threads, [&](std::int64_t block) {
    const auto version =
        gradient.beside == nullptr ? block_gradient<Type, Relu, false> : block_gradient<Type, Relu, true>;
    version(job, gradient, block, offset.data(), slope.data(), grad_x);
  });
}

}  // namespace

bool is_supported() { return level() >= Level::bf16; }

void forward(const Job& job, void* y, float* mean, float* variance, int threads) {
  if (job.channels == 0 || job.pixels == 0) return;
  if (job.type == DType::bf16) {
    statistics<DType::bf16>(job, mean, variance, threads);
  } else {
    statistics<DType::f32>(job, mean, variance, threads);
  }
  const Affine affine(job, mean, variance);
  const affine_relu::Images images{job.type, job.pixels, job.channels, job.relu};
  affine_relu::run(images, job.x, affine.scale.data(), affine.shift.data(), y, threads);
}

void backward(const Job& job, const void* grad, const void* beside, const float* mean, const float* variance,
              void* grad_x, float* grad_weight, float* grad_bias, int threads) {
  if (job.channels == 0 || job.pixels == 0) return;
  const Affine affine(job, mean, variance);
  const Gradient gradient{grad, beside, mean, affine.scale.data(), affine.shift.data()};
  const auto run = [&](const auto& version) {
    version(job, gradient, variance, grad_x, grad_weight, grad_bias, threads);
  };
  if (job.type == DType::bf16) {
    job.relu ? run(backward<DType::bf16, true>) : run(backward<DType::bf16, false>);
  } else {
    job.relu ? run(backward<DType::f32, true>) : run(backward<DType::f32, false>);
  }
}

#else

bool is_supported() { return false; }
void forward(const Job&, void*, float*, float*, int) {}
void backward(const Job&, const void*, const void*, const float*, const float*, void*, float*, float*, int) {}

#endif

}  // namespace pbe::batch_norm
