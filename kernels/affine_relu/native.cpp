#include "affine_relu/native.h"

#include "avx512.h"
#include "parallel.h"

namespace pbe::affine_relu {

#ifdef PBE_X86
namespace {

using namespace pbe::avx512;

// Elements per thread at least: 64 KB in and 64 KB out.
constexpr std::int64_t kGrain = 1 << 15;

template <DType Type, bool Relu>
PBE_AVX512 void run_pixels(const void* x, const float* scale, const float* shift, void* out, std::int64_t pixels,
                           std::int64_t channels) {
  const __m512 zero = _mm512_setzero_ps();
  for (std::int64_t at = 0; at < pixels * channels; at += channels) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const __mmask16 lanes = first_lanes(channels - c);
      const __m512 value = _mm512_fmadd_ps(load<Type>(advance(x, at + c, Type), lanes),
                                           load<DType::f32>(scale + c, lanes), load<DType::f32>(shift + c, lanes));
      // Of two operands the second is taken where one is NaN: so it passes, as in torch.relu.
      store<Type, true>(advance(out, at + c, Type), Relu ? _mm512_max_ps(zero, value) : value, lanes);
    }
  }
}

PBE_AVX512 void backward_pixels(const std::uint16_t* grad, const std::uint16_t* y, const float* scale,
                                std::uint16_t* out, std::int64_t pixels, std::int64_t channels) {
  for (std::int64_t pixel = 0; pixel < pixels; ++pixel, grad += channels, y += channels, out += channels) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const __mmask16 lanes = first_lanes(channels - c);
      const __m512 let_through = load<DType::bf16>(grad + c, above_zero(y + c, lanes));
      const __m512 value = _mm512_mul_ps(let_through, load<DType::f32>(scale + c, lanes));
      store<DType::bf16, true>(out + c, value, lanes);
    }
  }
}

}  // namespace

bool is_supported() { return level() >= Level::bf16; }

void run(const Images& images, const void* x, const float* scale, const float* shift, void* out, int threads) {
  if (images.channels == 0) return;
  const auto version = images.type == DType::bf16
                           ? (images.relu ? run_pixels<DType::bf16, true> : run_pixels<DType::bf16, false>)
                           : (images.relu ? run_pixels<DType::f32, true> : run_pixels<DType::f32, false>);
  parallel_for(images.pixels, kGrain / images.channels + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t at = begin * images.channels;
    version(advance(x, at, images.type), scale, shift, advance(out, at, images.type), end - begin, images.channels);
  });
}

void backward(const std::uint16_t* grad, const std::uint16_t* y, const float* scale, std::uint16_t* out,
              std::int64_t pixels, std::int64_t channels, int threads) {
  if (channels == 0) return;
  parallel_for(pixels, kGrain / channels + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t at = begin * channels;
    backward_pixels(grad + at, y + at, scale, out + at, end - begin, channels);
  });
}

#else

bool is_supported() { return false; }
void run(const Images&, const void*, const float*, const float*, void*, int) {}
void backward(const std::uint16_t*, const std::uint16_t*, const float*, std::uint16_t*, std::int64_t, std::int64_t,
              int) {}

#endif

}  // namespace pbe::affine_relu
