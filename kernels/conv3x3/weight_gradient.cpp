#include <algorithm>
#include <vector>

#include "conv3x3/winograd_avx512.h"
#include "parallel.h"

namespace pbe::conv3x3 {

#ifdef PBE_X86
namespace {

// Transformed tiles of one thread.
constexpr std::int64_t kScratchBytes = 1 << 18;

// How the work is cut. Tiles go in pairs along a row: the products sum over them two by two.
struct Plan {
  explicit Plan(const Gradient& job) {
    pairs_across = (job.width + 3) / 4;
    rows_in_all = job.images * ((job.height + 1) / 2);
    depth = groups_of(job.channels_in) * kGroup;
    columns = groups_of(job.channels_out) * kGroup;
    const std::int64_t bytes_per_row = kPositions * pairs_across * 2 * (depth + columns) * 2;
    rows = std::clamp<std::int64_t>(kScratchBytes / bytes_per_row, 1, std::max<std::int64_t>(rows_in_all, 1));
    const std::int64_t pairs = rows * pairs_across;
    // One cache line more, as in the convolution.
    input_stride = pairs * depth * 2 + 64 / 2;
    output_stride = pairs * columns * 2 + 64 / 2;
  }

  std::int64_t pairs_across, rows_in_all, depth, columns, rows;
  // From one position to the next.
  std::int64_t input_stride, output_stride;
};

// B^T d B of one row of tiles: V[position][pair of tiles][channel in][2].
PBE_BF16 void transform_input(const Gradient& job, const Plan& plan, const Interleaving& by, std::int64_t row,
                              std::uint16_t* v) {
  const Lines lines({job.x, nullptr, job.height, job.width, job.channels_in}, row);
  for (std::int64_t channel = 0; channel < job.channels_in; channel += kGroup) {
    const __mmask16 lanes = first_lanes(job.channels_in - channel);
    __m512 c[6][4];
    for (int i = 0; i < 4; ++i) c[0][i] = _mm512_setzero_ps();
    column<false>(lines, 0, channel, lanes, c[1]);
    for (std::int64_t pair = 0; pair < plan.pairs_across; ++pair) {
      for (int i = 2; i < 6; ++i) column<false>(lines, 4 * pair + i - 1, channel, lanes, c[i]);
      std::uint16_t* const out = v + (pair * plan.depth + channel) * 2;
      for (int i = 0; i < 4; ++i) {
        __m512 first[4], second[4];
        line(c[0], c[1], c[2], c[3], i, first);
        line(c[2], c[3], c[4], c[5], i, second);
        for (int j = 0; j < 4; ++j)
          _mm512_storeu_si512(out + (4 * i + j) * plan.input_stride, interleaved(by, first[j], second[j]));
        c[0][i] = c[4][i];
        c[1][i] = c[5][i];
      }
    }
  }
}

// A g of two numbers. A = [1 0; 1 1; 1 -1; 0 -1].
PBE_BF16 PBE_INLINE void spread(__m512 a, __m512 b, __m512 out[4]) {
  out[0] = a;
  out[1] = _mm512_add_ps(a, b);
  out[2] = _mm512_sub_ps(a, b);
  out[3] = _mm512_sub_ps(_mm512_setzero_ps(), b);
}

// A g A^T of one row of tiles: Z[position][pair of tiles][channel out][2].
PBE_BF16 void transform_gradient(const Gradient& job, const Plan& plan, const Interleaving& by, std::int64_t row,
                                 std::uint16_t* z) {
  const std::int64_t down = (job.height + 1) / 2, top = 2 * (row % down);
  const std::int64_t begin = (row / down * job.height + top) * job.width * job.channels_out;
  for (std::int64_t channel = 0; channel < job.channels_out; channel += kGroup) {
    const __mmask16 lanes = first_lanes(job.channels_out - channel);
    for (std::int64_t pair = 0; pair < plan.pairs_across; ++pair) {
      // A g of four columns of pixels, two of each tile.
      __m512 c[4][4];
      for (int i = 0; i < 4; ++i) {
        const std::int64_t x = 4 * pair + i;
        const bool is_inside = x < job.width, has_second = is_inside && top + 1 < job.height;
        const std::int64_t at = begin + (is_inside ? x : 0) * job.channels_out + channel;
        spread(load(job.grad + at, is_inside ? lanes : __mmask16{0}),
               load(job.grad + at + (has_second ? job.width * job.channels_out : 0), has_second ? lanes : __mmask16{0}),
               c[i]);
      }
      std::uint16_t* const out = z + (pair * plan.columns + channel) * 2;
      for (int i = 0; i < 4; ++i) {
        __m512 first[4], second[4];
        spread(c[0][i], c[1][i], first);
        spread(c[2][i], c[3][i], second);
        for (int j = 0; j < 4; ++j)
          _mm512_storeu_si512(out + (4 * i + j) * plan.output_stride, interleaved(by, first[j], second[j]));
      }
    }
  }
}

// Adds Z^T V of some pairs of tiles to M[channel out][channel in], for Height channels out and Registers groups in.
template <int Height, int Registers>
PBE_BF16 void multiply(const Plan& plan, const std::uint16_t* z, const std::uint16_t* v, std::int64_t pairs, float* m) {
  for (std::int64_t row = 0; row < plan.columns; row += Height) {
    for (std::int64_t group = 0; group < plan.depth; group += Registers * kGroup) {
      float* const out = m + row * plan.depth + group;
      __m512 sums[Height][Registers];
      for (int i = 0; i < Height; ++i)
        for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_loadu_ps(out + i * plan.depth + j * kGroup);
      const std::uint16_t *left = z + 2 * row, *right = v + 2 * group;
      for (std::int64_t k = 0; k < pairs; ++k, left += 2 * plan.columns, right += 2 * plan.depth) {
        __m512bh both[Registers];
        for (int j = 0; j < Registers; ++j)
          both[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + j * 2 * kGroup));
#pragma GCC unroll 16
        for (int i = 0; i < Height; ++i) {
          const __m512bh one = pair(left + 2 * i);
          for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], one, both[j]);
        }
      }
      for (int i = 0; i < Height; ++i)
        for (int j = 0; j < Registers; ++j) _mm512_storeu_ps(out + i * plan.depth + j * kGroup, sums[i][j]);
    }
  }
}

// Adds the rows of tiles from `begin` on to M[position][channel out][channel in].
void add_rows(const Gradient& job, const Plan& plan, std::int64_t begin, std::int64_t end, float* m) {
  static thread_local std::vector<std::uint16_t> inputs, gradients;
  inputs.resize(static_cast<std::size_t>(kPositions * plan.input_stride));
  gradients.resize(static_cast<std::size_t>(kPositions * plan.output_stride));
  const Interleaving by;
  const std::int64_t groups = plan.depth / kGroup;
  const auto function = groups % 4 == 0 ? multiply<4, 4> : groups % 2 == 0 ? multiply<8, 2> : multiply<16, 1>;
  for (std::int64_t row = begin; row < end; row += plan.rows) {
    const std::int64_t stop = std::min(end, row + plan.rows);
    for (std::int64_t i = row; i < stop; ++i) {
      const std::int64_t first = (i - row) * plan.pairs_across * 2;
      transform_input(job, plan, by, i, inputs.data() + first * plan.depth);
      transform_gradient(job, plan, by, i, gradients.data() + first * plan.columns);
    }
    for (int position = 0; position < kPositions; ++position)
      function(plan, gradients.data() + position * plan.output_stride, inputs.data() + position * plan.input_stride,
               (stop - row) * plan.pairs_across, m + position * plan.columns * plan.depth);
  }
}

// G^T m of four numbers. G^T = [1 1/2 1/2 0; 0 1/2 -1/2 0; 0 1/2 1/2 1].
PBE_BF16 PBE_INLINE void gather(const __m512 m[4], __m512 out[3]) {
  const __m512 half = _mm512_set1_ps(0.5f), sum = _mm512_mul_ps(half, _mm512_add_ps(m[1], m[2]));
  out[0] = _mm512_add_ps(m[0], sum);
  out[1] = _mm512_mul_ps(half, _mm512_sub_ps(m[1], m[2]));
  out[2] = _mm512_add_ps(sum, m[3]);
}

// G^T M G of one channel out, M being the sum of `parts` of them, `stride` apart.
PBE_BF16 void transform_weight(const Gradient& job, const Plan& plan, const float* m, std::int64_t stride, int parts,
                               std::int64_t channel_out) {
  for (std::int64_t channel = 0; channel < job.channels_in; channel += kGroup) {
    const __mmask16 lanes = first_lanes(job.channels_in - channel);
    __m512 down[4][3];
    for (int j = 0; j < 4; ++j) {
      __m512 d[4];
      for (int i = 0; i < 4; ++i) {
        const float* at = m + ((4 * i + j) * plan.columns + channel_out) * plan.depth + channel;
        d[i] = _mm512_loadu_ps(at);
        for (int part = 1; part < parts; ++part) d[i] = _mm512_add_ps(d[i], _mm512_loadu_ps(at + part * stride));
      }
      gather(d, down[j]);
    }
    for (int i = 0; i < 3; ++i) {
      const __m512 across[4] = {down[0][i], down[1][i], down[2][i], down[3][i]};
      __m512 taps[3];
      gather(across, taps);
      for (int j = 0; j < 3; ++j)
        _mm512_mask_storeu_ps(job.out + ((channel_out * 3 + i) * 3 + j) * job.channels_in + channel, lanes, taps[j]);
    }
  }
}

}  // namespace

void weight_gradient(const Gradient& job, int threads) {
  const Plan plan(job);
  const int parts = static_cast<int>(std::clamp<std::int64_t>(plan.rows_in_all, 1, std::max(threads, 1)));
  const std::int64_t stride = kPositions * plan.columns * plan.depth;
  static thread_local std::vector<float> sums;
  sums.assign(static_cast<std::size_t>(parts * stride), 0.0f);
  float* const m = sums.data();
  parallel_for(parts, 1, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      add_rows(job, plan, part * plan.rows_in_all / parts, (part + 1) * plan.rows_in_all / parts, m + part * stride);
  });
  parallel_for(job.channels_out, 16, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t channel = begin; channel < end; ++channel) transform_weight(job, plan, m, stride, parts, channel);
  });
}

#else

void weight_gradient(const Gradient&, int) {}

#endif

}  // namespace pbe::conv3x3
