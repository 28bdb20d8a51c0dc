// The linf step of a stretch of memory, with its model input, in one loop: no value is written and read again.
#pragma once

#include "avx512.h"
#include "native.h"

#ifdef PBE_X86
namespace pbe::pgd_step::avx512 {

using namespace pbe::avx512;

// A type that no model reads, for "no model input is wanted".
constexpr DType kNoInput = DType::u8;

// What one call of the loop works on. Mean and 1/std are one pair, or in channels_last a pair per element.
struct Stretch {
  const float *adv, *origin;
  const void* grad;
  float* next;
  void* input;
  std::int64_t n;
  float eps, alpha;
  const float *mean, *inverse_std;
};

enum class Affine { none, one, each };

struct Constants {
  __m512 eps, lowest, alpha, mean, inverse_std;  // lowest: -eps
};

PBE_AVX512 PBE_INLINE __m512 step(__m512 adv, __m512 origin, __m512 grad, const Constants& c) {
  const __m512 zero = _mm512_setzero_ps();
  // alpha with the gradient's sign: bit by bit, grad where the mask has a one. 0 and NaN have none.
  const __m512i signs = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512 signed_alpha = _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(grad), _mm512_castps_si512(c.alpha), signs, 0xe4));
  const __m512 moved = _mm512_mask_add_ps(adv, _mm512_cmp_ps_mask(grad, zero, _CMP_NEQ_OQ), adv, signed_alpha);
  // Of two operands these take the second where one is NaN: so it passes, as in torch.clamp.
  __m512 delta = _mm512_max_ps(c.lowest, _mm512_sub_ps(moved, origin));
  delta = _mm512_min_ps(c.eps, delta);
  const __m512 next = _mm512_max_ps(zero, _mm512_add_ps(origin, delta));
  return _mm512_min_ps(_mm512_set1_ps(1.0f), next);
}

// kLanes elements: stores x' and returns the model input.
template <DType Grad, Affine affine>
PBE_AVX512 PBE_INLINE __m512 linf_lanes(const Stretch& s, const Constants& c, std::int64_t i, __mmask16 mask) {
  const __m512 adv = load<DType::f32>(s.adv + i, mask), origin = load<DType::f32>(s.origin + i, mask);
  const __m512 next = step(adv, origin, load<Grad>(advance(s.grad, i, Grad), mask), c);
  store<DType::f32, false>(s.next + i, next, mask);
  if constexpr (affine == Affine::none) return next;
  if constexpr (affine == Affine::one) return _mm512_mul_ps(_mm512_sub_ps(next, c.mean), c.inverse_std);
  const __m512 mean = load<DType::f32>(s.mean + i, mask);
  return _mm512_mul_ps(_mm512_sub_ps(next, mean), load<DType::f32>(s.inverse_std + i, mask));
}

template <DType Grad, DType Input, Affine affine, bool HasBf16>
PBE_AVX512 void linf(const Stretch& stretch) {
  // Copies, which no store can change.
  const Stretch s = stretch;
  Constants c{_mm512_set1_ps(s.eps), _mm512_set1_ps(-s.eps), _mm512_set1_ps(s.alpha), _mm512_setzero_ps(),
              _mm512_setzero_ps()};
  if constexpr (affine == Affine::one) {
    c.mean = _mm512_set1_ps(*s.mean);
    c.inverse_std = _mm512_set1_ps(*s.inverse_std);
  }
  const __mmask16 all = first_lanes(kLanes);
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= s.n; i += 2 * kLanes) {
    const __m512 low = linf_lanes<Grad, affine>(s, c, i, all), high = linf_lanes<Grad, affine>(s, c, i + kLanes, all);
    if constexpr (Input != kNoInput) store<Input, HasBf16>(advance(s.input, i, Input), low, high);
  }
  for (; i < s.n; i += kLanes) {
    const __mmask16 mask = first_lanes(s.n - i);
    const __m512 input = linf_lanes<Grad, affine>(s, c, i, mask);
    if constexpr (Input != kNoInput) store<Input, HasBf16>(advance(s.input, i, Input), input, mask);
  }
}

using Loop = void (*)(const Stretch&);

template <DType Grad, DType Input, bool HasBf16>
Loop loop_for(Affine affine) {
  switch (affine) {
    case Affine::none: return linf<Grad, Input, Affine::none, HasBf16>;
    case Affine::one: return linf<Grad, Input, Affine::one, HasBf16>;
    default: return linf<Grad, Input, Affine::each, HasBf16>;
  }
}

template <DType Grad>
Loop loop_for(DType input, Affine affine, bool has_bf16) {
  switch (input) {
    case DType::f32: return loop_for<Grad, DType::f32, false>(affine);
    case DType::f16: return loop_for<Grad, DType::f16, false>(affine);
    case kNoInput: return linf<Grad, kNoInput, Affine::none, false>;
    default: return has_bf16 ? loop_for<Grad, DType::bf16, true>(affine) : loop_for<Grad, DType::bf16, false>(affine);
  }
}

// The loop for a gradient and a model input of these types.
inline Loop loop_for(DType grad, DType input, Affine affine, bool has_bf16) {
  switch (grad) {
    case DType::f32: return loop_for<DType::f32>(input, affine, has_bf16);
    case DType::f16: return loop_for<DType::f16>(input, affine, has_bf16);
    default: return loop_for<DType::bf16>(input, affine, has_bf16);
  }
}

}  // namespace pbe::pgd_step::avx512
#endif
