#include "affine_relu/native.h"

#include <algorithm>

#include "avx512.h"
#include "parallel.h"

namespace pbe::affine_relu {

#ifdef PBE_X86
namespace {

using namespace pbe::avx512;

// Elements per thread at least: 64 KB in and 64 KB out.
constexpr std::int64_t kGrain = 1 << 15;
// Elements that stay in the first cache while sixteen channels after the other are worked on, whose constants are then
// loaded once for many pixels.
constexpr std::int64_t kBlock = 1 << 10;

// body(first element, pixels) of all blocks.
template <class Body>
void over_blocks(std::int64_t pixels, std::int64_t channels, int threads, const Body& body) {
  if (channels == 0) return;
  const std::int64_t most = kBlock / channels + 1;
  parallel_for(pixels, kGrain / channels + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin += most) body(begin * channels, std::min(most, end - begin));
  });
}

template <DType Type, bool Relu>
PBE_AVX512 void run_block(const void* x, const float* scale, const float* shift, void* out, std::int64_t pixels,
                          std::int64_t channels) {
  const __m512 zero = _mm512_setzero_ps();
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const __mmask16 lanes = first_lanes(channels - c);
    const __m512 scales = load<DType::f32>(scale + c, lanes), shifts = load<DType::f32>(shift + c, lanes);
    for (std::int64_t at = c; at < pixels * channels; at += channels) {
      const __m512 value = _mm512_fmadd_ps(load<Type>(advance(x, at, Type), lanes), scales, shifts);
      // Of two operands the second is taken where one is NaN: so it passes, as in torch.relu.
      store<Type, true>(advance(out, at, Type), Relu ? _mm512_max_ps(zero, value) : value, lanes);
    }
  }
}

template <bool Scaled, bool Beside>
PBE_AVX512 void backward_block(const Gradient& all, std::int64_t first, std::int64_t pixels, std::int64_t channels) {
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    const __mmask16 lanes = first_lanes(channels - c);
    const __m512 scales = Scaled ? load<DType::f32>(all.scale + c, lanes) : _mm512_set1_ps(1.0f);
    for (std::int64_t at = first + c; at < first + pixels * channels; at += channels) {
      __m512 value = load<DType::bf16>(all.grad + at, above_zero(all.y + at, lanes));
      if constexpr (Beside) {
        value = _mm512_fmadd_ps(value, scales, load<DType::bf16>(all.beside + at, lanes));
      } else if constexpr (Scaled) {
        value = _mm512_mul_ps(value, scales);
      }
      store<DType::bf16, true>(all.out + at, value, lanes);
    }
  }
}

}  // namespace

bool is_supported() { return level() >= Level::bf16; }

void run(const Images& images, const void* x, const float* scale, const float* shift, void* out, int threads) {
  const DType type = images.type;
  const auto version = type == DType::bf16
                           ? (images.relu ? run_block<DType::bf16, true> : run_block<DType::bf16, false>)
                           : (images.relu ? run_block<DType::f32, true> : run_block<DType::f32, false>);
  over_blocks(images.pixels, images.channels, threads, [&](std::int64_t at, std::int64_t pixels) {
    version(advance(x, at, type), scale, shift, advance(out, at, type), pixels, images.channels);
  });
}

void backward(const Gradient& all, std::int64_t pixels, std::int64_t channels, int threads) {
  const auto version = all.scale == nullptr
                           ? (all.beside == nullptr ? backward_block<false, false> : backward_block<false, true>)
                           : (all.beside == nullptr ? backward_block<true, false> : backward_block<true, true>);
  over_blocks(pixels, channels, threads,
              [&](std::int64_t at, std::int64_t count) { version(all, at, count, channels); });
}

#else

bool is_supported() { return false; }
void run(const Images&, const void*, const float*, const float*, void*, int) {}
void backward(const Gradient&, std::int64_t, std::int64_t, int) {}

#endif

}  // namespace pbe::affine_relu
