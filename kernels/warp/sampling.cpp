#include "sampling.h"

#include <algorithm>
#include <cstring>

#include "clones.h"
#include "levels.h"
#include "windows_avx512.h"

namespace pbe::warp {
namespace {

// One call of the loops below.
constexpr std::int64_t kPiece = 256;

PBE_INLINE float weighted(const Taps& taps, std::int64_t i, float a, float b, float c, float d) {
  const float* weight = taps.weight + i;
  const std::int64_t stride = taps.weight_stride;
  return ((weight[0] * a + weight[stride] * b) + weight[2 * stride] * c) + weight[3 * stride] * d;
}

template <class In>
PBE_INLINE void sample_each(const In* in, const Plane& plane, const Taps& taps, std::int64_t begin, std::int64_t end,
                            float* out) {
  for (std::int64_t i = begin; i < end; ++i) {
    const In* tap = in + taps.offset[i];
    out[i - begin] = weighted(taps, i, tap[0], tap[plane.right], tap[plane.down], tap[plane.down + plane.right]);
  }
}

// Two taps that are neighbours in memory come with one load, and the arithmetic after the loads is vectorised.
PBE_CLONES void sample_pairs(const float* in, const Plane& plane, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  float upper[2 * kPiece], lower[2 * kPiece];
  for (; begin < end; begin += kPiece, out += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const float* tap = in + taps.offset[begin + i];
      std::memcpy(upper + 2 * i, tap, 2 * sizeof(float));
      std::memcpy(lower + 2 * i, tap + plane.down, 2 * sizeof(float));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] = weighted(taps, begin + i, upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]);
    }
  }
}

PBE_CLONES void sample_pairs(const std::uint8_t* in, const Plane& plane, const Taps& taps, std::int64_t begin,
                             std::int64_t end, float* out) {
  std::uint8_t quads[4 * kPiece];
  for (; begin < end; begin += kPiece, out += kPiece) {
    const std::int64_t n = std::min(kPiece, end - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* tap = in + taps.offset[begin + i];
      std::memcpy(quads + 4 * i, tap, 2);
      std::memcpy(quads + 4 * i + 2, tap + plane.down, 2);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint8_t* quad = quads + 4 * i;
      out[i] = weighted(taps, begin + i, quad[0], quad[1], quad[2], quad[3]);
    }
  }
}

PBE_CLONES void scale_shift(float* values, std::int64_t n, float scale, float shift) {
  for (std::int64_t i = 0; i < n; ++i) values[i] = values[i] * scale + shift;
}

PBE_CLONES void scale_shift(float* values, std::int64_t n, const float* scale, const float* shift) {
  for (std::int64_t i = 0; i < n; ++i) values[i] = values[i] * scale[i] + shift[i];
}

PBE_CLONES void round_to_u8(const float* in, std::uint8_t* out, std::int64_t n) {
  // The sum's last mantissa bit is worth one: the float unit rounds half to even, and the low byte is the result.
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::uint8_t>(bits_of_float(in[i] + 0x1.8p23f));
}

template <class In>
void sample_loads(const Stack<In>& stack, const Plane& plane, const Taps& taps, std::int64_t begin, float* scratch) {
  const std::int64_t n = taps.n - begin;
  for (std::int64_t k = 0; k < stack.count; ++k) {
    const In* in = stack.in + k * stack.in_stride;
    void* out = advance(stack.out, k * stack.out_stride + begin, stack.out_type);
    float* sums = stack.out_type == DType::f32 ? static_cast<float*>(out) : scratch;
    if (plane.right == 1) {
      sample_pairs(in, plane, taps, begin, taps.n, sums);
    } else {
      sample_each(in, plane, taps, begin, taps.n, sums);
    }
    if (stack.affine.scale != nullptr) {
      const std::int64_t first = stack.affine.first(k, begin);
      const float *scale = stack.affine.scale + first, *shift = stack.affine.shift + first;
      if (stack.affine.per_element) {
        scale_shift(sums, n, scale, shift);
      } else {
        scale_shift(sums, n, *scale, *shift);
      }
    }
    if (stack.out_type == DType::u8) {
      round_to_u8(sums, static_cast<std::uint8_t*>(out), n);
    } else if (sums != out) {
      narrow(sums, out, stack.out_type, n);
    }
  }
}

template <class In>
void sample_any(const Stack<In>& stack, const Plane& plane, const Taps& taps, [[maybe_unused]] const Window* windows,
                [[maybe_unused]] const std::uint8_t* places, float* sums) {
  std::int64_t done = 0;
#ifdef PBE_X86
  if (windows != nullptr) {
    avx512::loop_for<In>(stack.out_type, level() >= Level::bf16)(stack, plane, taps, windows, places);
    done = taps.n / kBlock * kBlock;
  }
#endif
  if (done < taps.n) sample_loads(stack, plane, taps, done, sums);
}

}  // namespace

bool has_windows() { return level() >= Level::vbmi; }

PBE_CLONES void find_windows(const Taps& taps, const Plane& plane, std::int64_t columns, Window* windows,
                             std::uint8_t* places) {
  const float inverse_row = 1.0f / static_cast<float>(plane.row);
  const std::int32_t more_rows = plane.down > 0 ? 1 : 0;
  for (std::int64_t block = 0; block < taps.n / kBlock; ++block) {
    const std::int32_t* offset = taps.offset + block * kBlock;
    std::int32_t x[kBlock], y[kBlock];
    for (std::int64_t i = 0; i < kBlock; ++i) {
      // A division that vectorises, exact below 2^22 (kLargestPlane).
      y[i] = static_cast<std::int32_t>((static_cast<float>(offset[i]) + 0.5f) * inverse_row);
      x[i] = offset[i] - y[i] * plane.row;
    }
    std::int32_t left = x[0], right = x[0], top = y[0], bottom = y[0];
    for (std::int64_t i = 1; i < kBlock; ++i) {
      left = std::min(left, x[i]);
      right = std::max(right, x[i]);
      top = std::min(top, y[i]);
      bottom = std::max(bottom, y[i]);
    }
    const std::int32_t rows = bottom + more_rows - top + 1;
    // A window must end inside of the plane: at the lower edge it begins further left, in the row before if need be.
    const std::int64_t base = static_cast<std::int64_t>(top) * plane.row + left;
    const std::int64_t latest = plane.size - columns - static_cast<std::int64_t>(rows - 1) * plane.row;
    const std::int64_t shift = std::max<std::int64_t>(base - latest, 0);
    const bool fits = rows >= 2 && rows <= 4 && latest >= 0 && right + plane.right - left + shift < columns;
    windows[block] = {static_cast<std::int32_t>(base - shift),
                      fits ? rows : 0,
                      {plane.row, std::min(2, rows - 1) * plane.row, std::min(3, rows - 1) * plane.row}};
    const std::int32_t start = left - static_cast<std::int32_t>(shift);
    for (std::int64_t i = 0; i < kBlock; ++i) {
      places[block * kBlock + i] = static_cast<std::uint8_t>((y[i] - top) * 32 + x[i] - start);
    }
  }
}

PBE_CLONES void drop_windows(const Taps& taps, Window* windows) {
  for (std::int64_t block = 0; block < taps.n / kBlock; ++block) {
    // As integers, NaN and what is negative are larger than what is not.
    std::uint32_t largest = 0;
    for (int tap = 0; tap < 4; ++tap) {
      const float* weight = taps.weight + tap * taps.weight_stride + block * kBlock;
      for (std::int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, bits_of_float(weight[i]));
    }
    if (largest > bits_of_float(1.0f)) windows[block].rows = 0;
  }
}

void sample(const Stack<float>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places, float* sums) {
  sample_any(stack, plane, taps, windows, places, sums);
}

void sample(const Stack<std::uint8_t>& stack, const Plane& plane, const Taps& taps, const Window* windows,
            const std::uint8_t* places, float* sums) {
  sample_any(stack, plane, taps, windows, places, sums);
}

}  // namespace pbe::warp
