#include "cosine_rank/native.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "parallel.h"

// Vectors of gcc and clang rather than intrinsics: one text for SSE2, AVX2, AVX-512 and NEON, and it may be cloned.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about passing wide vectors to functions; here all of those are inlined
#endif

namespace pbe::cosine_rank {
namespace {

constexpr int kLanes = 4;
// Rows shorter than this are worked on four at a time, one per lane: sums across lanes would cost more than the sums.
constexpr std::int64_t kShortRow = 24;
// Under this many elements a second thread costs more than it brings.
constexpr std::int64_t kGrain = 16384;

typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
typedef std::uint32_t Bits __attribute__((vector_size(16)));
typedef std::uint16_t Halves __attribute__((vector_size(16)));
typedef std::int64_t Longs __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));

struct F16 {
  std::uint16_t bits;
};
struct BF16 {
  std::uint16_t bits;
};

template <class To, class From>
PBE_INLINE To bit_cast(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Four halves, and four zeros behind them.
PBE_INLINE Halves load_halves(const void* at) {
  std::int64_t halves;
  std::memcpy(&halves, at, sizeof halves);
  return bit_cast<Halves>(Longs{halves, 0});
}

PBE_INLINE Floats load(const float* at) {
  Floats values;
  std::memcpy(&values, at, sizeof values);
  return values;
}

PBE_INLINE Floats load(const BF16* at) {
  return bit_cast<Floats>(__builtin_shufflevector(Halves{}, load_halves(at), 0, 8, 0, 9, 0, 10, 0, 11));
}

// from_f16 of convert.h, four at a time; subnormal numbers come out of the subtraction.
PBE_INLINE Floats load(const F16* at) {
  const Bits half = bit_cast<Bits>(__builtin_shufflevector(load_halves(at), Halves{}, 0, 8, 1, 8, 2, 8, 3, 8));
  const Bits shifted = (half & 0x7fffu) << 13;
  const Bits exponent = shifted & 0x0f800000u;
  const Floats smallest = bit_cast<Floats>(Bits{} + 0x38800000u);
  const Bits subnormal = bit_cast<Bits>(bit_cast<Floats>(shifted + 0x38800000u) - smallest);
  const Bits special = bit_cast<Bits>(exponent == 0x0f800000u);
  const Bits normal = shifted + 0x38000000u + (special & 0x38000000u);
  const Bits tiny = bit_cast<Bits>(exponent == 0u);
  return bit_cast<Floats>((tiny & subnormal) | (~tiny & normal) | ((half & 0x8000u) << 16));
}

// float64 sums: they neither overflow nor vanish for any float32, and 1 - cos of them keeps nine digits at 1e-7, so
// that one pass over the values is enough.
struct Sums {
  Doubles aa{}, bb{}, ab{};

  PBE_INLINE void add(const Floats& a, const Floats& b) {
    const Doubles x = {a[0], a[1], a[2], a[3]};
    const Doubles y = {b[0], b[1], b[2], b[3]};
    aa += x * x;
    bb += y * y;
    ab += x * y;
  }
};

PBE_INLINE double root(double value) { return std::sqrt(value); }

PBE_INLINE Doubles root(const Doubles& values) {
  Doubles roots;
  for (int i = 0; i < kLanes; ++i) roots[i] = std::sqrt(values[i]);
  return roots;
}

// For one row (T = double) or four (Doubles).
template <class T>
PBE_INLINE T distance_of(const T& aa, const T& bb, const T& ab) {
  const T zero{}, one = zero + 1.0, two = zero + 2.0;
  const T product = aa * bb;
  const T distance = one - ab / root(product);
  // Rounding may leave [0, 2] by 1e-16; comparisons with NaN are false and let it pass.
  const T lower = distance < zero ? zero : distance;
  const T bounded = lower > two ? two : lower;
  return product == zero ? one : bounded;
}

// Keeps gcc from taking shuffled vectors apart again, into scalar loads, where they are widened.
PBE_INLINE void keep_whole([[maybe_unused]] Floats& vector) {
#if defined(__GNUC__) && defined(__x86_64__)
  asm("" : "+x"(vector));
#endif
}

// Four rows of four values as four columns of four rows.
template <class T>
PBE_INLINE void load_columns(const T* at, std::int64_t stride, Floats columns[kLanes]) {
  const Floats row0 = load(at), row1 = load(at + stride), row2 = load(at + 2 * stride), row3 = load(at + 3 * stride);
  const Floats low01 = __builtin_shufflevector(row0, row1, 0, 4, 1, 5);
  const Floats low23 = __builtin_shufflevector(row2, row3, 0, 4, 1, 5);
  const Floats high01 = __builtin_shufflevector(row0, row1, 2, 6, 3, 7);
  const Floats high23 = __builtin_shufflevector(row2, row3, 2, 6, 3, 7);
  columns[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  columns[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  columns[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  columns[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
  for (int j = 0; j < kLanes; ++j) keep_whole(columns[j]);
}

// Four rows side by side, a row per lane. Reads classes values of each row, and below four classes also those in front
// of it, up to four.
template <class A, class B>
PBE_INLINE void short_rows(const A* a, std::int64_t stride_a, const B* b, std::int64_t stride_b, std::int64_t classes,
                           float out[kLanes]) {
  Sums sums;
  Floats x[kLanes], y[kLanes];
  std::int64_t k = 0;
  for (; k + kLanes <= classes; k += kLanes) {
    load_columns(a + k, stride_a, x);
    load_columns(b + k, stride_b, y);
    for (int j = 0; j < kLanes; ++j) sums.add(x[j], y[j]);
  }
  if (k < classes) {
    // The last four columns again, of which only the new ones count.
    load_columns(a + classes - kLanes, stride_a, x);
    load_columns(b + classes - kLanes, stride_b, y);
    if (classes - k > 2) sums.add(x[1], y[1]);
    if (classes - k > 1) sums.add(x[2], y[2]);
    sums.add(x[3], y[3]);
  }
  const Doubles result = distance_of(sums.aa, sums.bb, sums.ab);
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<float>(result[i]);
}

PBE_INLINE double total(const Doubles& a, const Doubles& b, const Doubles& c, const Doubles& d) {
  const Doubles v = (a + b) + (c + d);
  return (v[0] + v[1]) + (v[2] + v[3]);
}

template <class T>
PBE_INLINE Floats load_where(const Ints& counts, const T* at) {
  return bit_cast<Floats>(bit_cast<Ints>(load(at)) & counts);
}

template <class A, class B>
PBE_INLINE float long_row(const A* a, const B* b, std::int64_t classes) {
  Sums s0, s1, s2, s3;  // four chains of additions hide their latency
  std::int64_t k = 0;
  for (; k + 4 * kLanes <= classes; k += 4 * kLanes) {
    s0.add(load(a + k), load(b + k));
    s1.add(load(a + k + kLanes), load(b + k + kLanes));
    s2.add(load(a + k + 2 * kLanes), load(b + k + 2 * kLanes));
    s3.add(load(a + k + 3 * kLanes), load(b + k + 3 * kLanes));
  }
  for (; k + kLanes <= classes; k += kLanes) s0.add(load(a + k), load(b + k));
  if (k < classes) {
    const Ints lane = {0, 1, 2, 3};
    const Ints counts = lane >= static_cast<std::int32_t>(kLanes - (classes - k));
    s1.add(load_where(counts, a + classes - kLanes), load_where(counts, b + classes - kLanes));
  }
  return static_cast<float>(distance_of(total(s0.aa, s1.aa, s2.aa, s3.aa), total(s0.bb, s1.bb, s2.bb, s3.bb),
                                        total(s0.ab, s1.ab, s2.ab, s3.ab)));
}

template <class T>
struct Rows {
  const T* data;
  std::int64_t stride;

  PBE_INLINE const T* at(std::int64_t row) const { return data + row * stride; }
};

// A copy of the last few rows, or of the first ones, with room around them: four values may be read in front of each.
template <class T>
struct Padded {
  std::array<T, kLanes * kShortRow> values{};
  std::int64_t stride;

  PBE_INLINE Padded(const Rows<T>& rows, std::int64_t begin, std::int64_t count, std::int64_t classes)
      : stride(std::max<std::int64_t>(classes, kLanes)) {
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t k = 0; k < classes; ++k) values[(i + 1) * stride - classes + k] = rows.at(begin + i)[k];
    }
  }
  PBE_INLINE const T* first(std::int64_t classes) const { return values.data() + stride - classes; }
};

template <class A, class B>
PBE_INLINE void distances(const Rows<A>& a, const Rows<B>& b, std::int64_t begin, std::int64_t end,
                          std::int64_t classes, float* out) {
  if (classes >= kShortRow) {
    for (std::int64_t row = begin; row < end; ++row) out[row] = long_row(a.at(row), b.at(row), classes);
    return;
  }
  for (std::int64_t row = begin; row < end; row += kLanes) {
    const std::int64_t count = std::min<std::int64_t>(kLanes, end - row);
    const bool room = row * std::min(a.stride, b.stride) + classes >= kLanes;
    if (count == kLanes && room) {
      short_rows(a.at(row), a.stride, b.at(row), b.stride, classes, out + row);
      continue;
    }
    const Padded<A> edge_a(a, row, count, classes);
    const Padded<B> edge_b(b, row, count, classes);
    float edge[kLanes];
    short_rows(edge_a.first(classes), edge_a.stride, edge_b.first(classes), edge_b.stride, classes, edge);
    for (std::int64_t i = 0; i < count; ++i) out[row + i] = edge[i];
  }
}

// Clones cannot be templates.
#define PBE_DISTANCES(A, B)                                                                       \
  PBE_CLONES void range(const Rows<A>& a, const Rows<B>& b, std::int64_t begin, std::int64_t end, \
                        std::int64_t classes, float* out) {                                       \
    distances(a, b, begin, end, classes, out);                                                    \
  }
PBE_DISTANCES(float, float)
PBE_DISTANCES(float, F16)
PBE_DISTANCES(float, BF16)
PBE_DISTANCES(F16, F16)
PBE_DISTANCES(F16, BF16)
PBE_DISTANCES(BF16, BF16)

template <class A, class B>
void run(const Logits& a, const Logits& b, std::int64_t rows, std::int64_t classes, float* out, int threads) {
  const Rows<A> rows_a{static_cast<const A*>(a.data), a.stride};
  const Rows<B> rows_b{static_cast<const B*>(b.data), b.stride};
  parallel_for(rows, std::max<std::int64_t>(kGrain / classes, 1), threads,
               [&](std::int64_t begin, std::int64_t end) { range(rows_a, rows_b, begin, end, classes, out); });
}

}  // namespace

void distance(const Logits& a, const Logits& b, std::int64_t rows, std::int64_t classes, float* out, int threads) {
  // The distance is symmetric: half of the pairs of types are enough.
  if (a.type > b.type) return distance(b, a, rows, classes, out, threads);
  const bool brain = b.type == DType::bf16;
  switch (a.type) {
    case DType::f32:
      if (b.type == DType::f32) return run<float, float>(a, b, rows, classes, out, threads);
      return brain ? run<float, BF16>(a, b, rows, classes, out, threads)
                   : run<float, F16>(a, b, rows, classes, out, threads);
    case DType::f16:
      return brain ? run<F16, BF16>(a, b, rows, classes, out, threads)
                   : run<F16, F16>(a, b, rows, classes, out, threads);
    case DType::bf16: return run<BF16, BF16>(a, b, rows, classes, out, threads);
    case DType::u8: return;  // no logits
  }
}

}  // namespace pbe::cosine_rank
