#include "conv3x3/native.h"

#include <algorithm>
#include <vector>

#include "conv3x3/winograd_avx512.h"
#include "parallel.h"

namespace pbe::conv3x3 {

#ifdef PBE_X86
namespace {

// Transformed tiles and their products, of one thread: small enough for its second-level cache.
constexpr std::int64_t kScratchBytes = 1 << 16;
// Tiles are padded to a multiple of every register block's height.
constexpr std::int64_t kTileStep = 16;

// How the work is cut: rows of tiles, `rows` of them at a time through the scratch memory of one thread.
struct Plan {
  explicit Plan(const Job& job) {
    tiles_across = (job.width + 1) / 2;
    tiles_down = (job.height + 1) / 2;
    depth = groups_of(job.channels_in) * kGroup;
    const std::int64_t groups = groups_of(job.channels_out);
    registers = groups % 4 == 0 ? 4 : groups % 2 == 0 ? 2 : 1;
    const std::int64_t bytes_per_tile = kPositions * (depth * 2 + columns() * 4);
    rows = std::max<std::int64_t>(1, std::max(kTileStep, kScratchBytes / bytes_per_tile) / tiles_across);
    rows = std::min(rows, std::max<std::int64_t>(1, job.images * tiles_down));
    tiles = (rows * tiles_across + kTileStep - 1) / kTileStep * kTileStep;
    // One cache line more: at a power of two all positions of a tile would fall into the same few lines of the cache.
    tile_stride = tiles * depth + 64 / 2;
    product_stride = tiles * columns() + 64 / 4;
  }

  // Channels out whose products are in memory at a time.
  std::int64_t columns() const { return registers * kGroup; }

  std::int64_t tiles_across, tiles_down, depth, registers, rows, tiles;
  // From one position to the next.
  std::int64_t tile_stride, product_stride;
};

// B^T d B of one row of tiles: V[position][tile][channel in] of a block of `plan.tiles`, from `first` on.
template <bool HasMask>
PBE_BF16 void transform_input(const Job& job, const Plan& plan, std::int64_t row, std::uint16_t* v,
                              std::int64_t first) {
  const Lines lines({job.x, job.mask, job.height, job.width, job.channels_in}, row);
  for (std::int64_t channel = 0; channel < job.channels_in; channel += kGroup) {
    const __mmask16 lanes = first_lanes(job.channels_in - channel);
    // Two of a tile's four columns are its neighbour's.
    __m512 c[4][4];
    for (int i = 0; i < 4; ++i) c[0][i] = _mm512_setzero_ps();
    column<HasMask>(lines, 0, channel, lanes, c[1]);
    for (std::int64_t tile = 0; tile < plan.tiles_across; ++tile) {
      column<HasMask>(lines, 2 * tile + 1, channel, lanes, c[2]);
      column<HasMask>(lines, 2 * tile + 2, channel, lanes, c[3]);
      std::uint16_t* const out = v + (first + tile) * plan.depth + channel;
      for (int i = 0; i < 4; ++i) {
        __m512 d[4];
        line(c[0], c[1], c[2], c[3], i, d);
        for (int j = 0; j < 4; ++j)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (4 * i + j) * plan.tile_stride), narrow(d[j]));
        c[0][i] = c[2][i];
        c[1][i] = c[3][i];
      }
    }
  }
}

// M[position] = V[position] U[position] for `Registers` groups of channels out, in blocks of Height tiles.
template <int Height, int Registers>
PBE_BF16 void multiply(const Plan& plan, const std::uint16_t* v, const std::uint16_t* u, float* m) {
  const std::int64_t pairs = plan.depth / 2, group = kPositions * pairs * 2 * kGroup;
  for (int position = 0; position < kPositions; ++position) {
    const std::uint16_t* const filters = u + position * pairs * 2 * kGroup;
    for (std::int64_t tile = 0; tile < plan.tiles; tile += Height) {
      const std::uint16_t* const left = v + position * plan.tile_stride + tile * plan.depth;
      __m512 sums[Height][Registers];
      for (int i = 0; i < Height; ++i)
        for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_setzero_ps();
      for (std::int64_t k = 0; k < pairs; ++k) {
        __m512bh right[Registers];
        for (int j = 0; j < Registers; ++j)
          right[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(filters + j * group + k * 2 * kGroup));
#pragma GCC unroll 16
        for (int i = 0; i < Height; ++i) {
          const __m512bh both = pair(left + i * plan.depth + 2 * k);
          for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, right[j]);
        }
      }
      float* out = m + position * plan.product_stride + tile * Registers * kGroup;
      for (int i = 0; i < Height; ++i)
        for (int j = 0; j < Registers; ++j, out += kGroup) _mm512_storeu_ps(out, sums[i][j]);
    }
  }
}

// The same for 16 channels in and one group out: all filters of a position stay in registers.
PBE_BF16 void multiply_sixteen(const Plan& plan, const std::uint16_t* v, const std::uint16_t* u, float* m) {
  constexpr int kPairs = 8, kHeight = 8;
  for (int position = 0; position < kPositions; ++position) {
    __m512bh right[kPairs];
    for (int k = 0; k < kPairs; ++k)
      right[k] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(u + (position * kPairs + k) * 2 * kGroup));
    for (std::int64_t tile = 0; tile < plan.tiles; tile += kHeight) {
      const std::uint16_t* const left = v + position * plan.tile_stride + tile * kGroup;
      __m512 sums[kHeight];
      for (int i = 0; i < kHeight; ++i) sums[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int k = 0; k < kPairs; ++k)
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i)
          sums[i] = _mm512_dpbf16_ps(sums[i], pair(left + i * kGroup + 2 * k), right[k]);
      float* const out = m + position * plan.product_stride + tile * kGroup;
      for (int i = 0; i < kHeight; ++i) _mm512_storeu_ps(out + i * kGroup, sums[i]);
    }
  }
}

void multiply(const Plan& plan, const std::uint16_t* v, const std::uint16_t* u, float* m) {
  if (plan.registers == 4) {
    multiply<4, 4>(plan, v, u, m);
  } else if (plan.registers == 2) {
    multiply<8, 2>(plan, v, u, m);
  } else if (plan.depth == kGroup) {
    multiply_sixteen(plan, v, u, m);
  } else {
    multiply<16, 1>(plan, v, u, m);
  }
}

// A^T M A and what follows it of one row of tiles, for the channels out from `begin` on. A^T = [1 1 1 0; 0 1 -1 -1].
PBE_BF16 void transform_output(const Job& job, const Plan& plan, std::int64_t row, const float* m, std::int64_t first,
                               std::int64_t begin) {
  const std::int64_t image = row / plan.tiles_down, top = 2 * (row % plan.tiles_down);
  const std::int64_t columns = plan.columns(), line = job.width * job.channels_out;
  const int height = top + 1 < job.height ? 2 : 1;
  for (std::int64_t k = 0; k < columns && begin + k < job.channels_out; k += kGroup) {
    const __mmask16 lanes = first_lanes(job.channels_out - begin - k);
    const __m512 bias = job.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, job.bias + begin + k);
    // A^T M A is at hand: what is left to do with one pixel.
    const auto put = [&](std::int64_t at, __m512 value) PBE_BF16 {
      value = _mm512_add_ps(value, bias);
      if (job.residual != nullptr) value = _mm512_add_ps(value, load(job.residual + at, lanes));
      // Of two operands the second is taken where one is NaN: so it passes, as in torch.relu.
      if (job.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
      _mm256_mask_storeu_epi16(job.y + at, lanes, narrow(value));
    };
    std::int64_t out = (image * job.height + top) * line + begin + k;
    for (std::int64_t tile = 0; tile < plan.tiles_across; ++tile, out += 2 * job.channels_out) {
      const float* const in = m + (first + tile) * columns + k;
      __m512 s[2][4];
      for (int j = 0; j < 4; ++j) {
        __m512 d[4];
        for (int i = 0; i < 4; ++i) d[i] = _mm512_loadu_ps(in + (4 * i + j) * plan.product_stride);
        s[0][j] = _mm512_add_ps(_mm512_add_ps(d[0], d[1]), d[2]);
        s[1][j] = _mm512_sub_ps(_mm512_sub_ps(d[1], d[2]), d[3]);
      }
      const bool is_pair = 2 * tile + 1 < job.width;
      for (int i = 0; i < height; ++i) {
        const __m512 left = _mm512_add_ps(_mm512_add_ps(s[i][0], s[i][1]), s[i][2]);
        const __m512 right = _mm512_sub_ps(_mm512_sub_ps(s[i][1], s[i][2]), s[i][3]);
        put(out + i * line, left);
        if (is_pair) put(out + i * line + job.channels_out, right);
      }
    }
  }
}

void run_rows(const Job& job, const Plan& plan, std::int64_t begin, std::int64_t end) {
  static thread_local std::vector<std::uint16_t> tiles;
  static thread_local std::vector<float> products;
  tiles.resize(static_cast<std::size_t>(kPositions * plan.tile_stride));
  products.resize(static_cast<std::size_t>(kPositions * plan.product_stride));
  const std::int64_t filters = kPositions * plan.depth * plan.columns();
  for (std::int64_t row = begin; row < end; row += plan.rows) {
    const std::int64_t stop = std::min(end, row + plan.rows);
    const auto transform = job.mask == nullptr ? transform_input<false> : transform_input<true>;
    for (std::int64_t i = row; i < stop; ++i) transform(job, plan, i, tiles.data(), (i - row) * plan.tiles_across);
    const std::uint16_t* u = job.packed;
    for (std::int64_t k = 0; k < job.channels_out; k += plan.columns(), u += filters) {
      multiply(plan, tiles.data(), u, products.data());
      for (std::int64_t i = row; i < stop; ++i)
        transform_output(job, plan, i, products.data(), (i - row) * plan.tiles_across, k);
    }
  }
}

// G g G^T of 16 filters side by side. G = [1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1].
PBE_BF16 PBE_INLINE void transform_filters(const __m512 g[3][3], __m512 out[kPositions]) {
  const __m512 half = _mm512_set1_ps(0.5f);
  const auto rows_of_g = [&](__m512 a, __m512 b, __m512 c, __m512 to[4]) PBE_BF16 {
    const __m512 ends = _mm512_add_ps(a, c);
    to[0] = a;
    to[1] = _mm512_mul_ps(half, _mm512_add_ps(ends, b));
    to[2] = _mm512_mul_ps(half, _mm512_sub_ps(ends, b));
    to[3] = c;
  };
  __m512 down[3][4];
  for (int j = 0; j < 3; ++j) rows_of_g(g[0][j], g[1][j], g[2][j], down[j]);
  for (int i = 0; i < 4; ++i) rows_of_g(down[0][i], down[1][i], down[2][i], out + 4 * i);
}

// One group of channels out, which are lanes; two channels in make a pair.
PBE_BF16 void pack_group(const Filters& filters, std::int64_t group, std::uint16_t* packed) {
  const std::int64_t pairs = groups_of(filters.channels_in) * kGroup / 2;
  const __mmask16 lanes = first_lanes(filters.channels_out - group * kGroup);
  std::uint16_t* const out = packed + group * kPositions * pairs * 2 * kGroup;
  const Interleaving by;
  for (std::int64_t k = 0; k < pairs; ++k) {
    __m512 u[2][kPositions];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t channel = 2 * k + i;
      const bool exists = channel < filters.channels_in;
      const float* const weight = filters.weight + (exists ? channel : 0) * filters.channel_stride + group * kGroup;
      __m512 g[3][3];
      for (int tap = 0; tap < 9; ++tap)
        g[tap / 3][tap % 3] = _mm512_maskz_loadu_ps(exists ? lanes : __mmask16{0},
                                                    weight + (filters.rotated ? 8 - tap : tap) * filters.tap_stride);
      transform_filters(g, u[i]);
    }
    for (int position = 0; position < kPositions; ++position)
      _mm512_storeu_si512(out + (position * pairs + k) * 2 * kGroup, interleaved(by, u[0][position], u[1][position]));
  }
}

}  // namespace

bool is_supported() { return level() >= Level::bf16; }

void run(const Job& job, int threads) {
  const Plan plan(job);
  parallel_for(job.images * plan.tiles_down, plan.rows, threads,
               [&](std::int64_t begin, std::int64_t end) { run_rows(job, plan, begin, end); });
}

void pack(const Filters& filters, std::uint16_t* packed, int threads) {
  parallel_for(groups_of(filters.channels_out), 4, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t group = begin; group < end; ++group) pack_group(filters, group, packed);
  });
}

#else

bool is_supported() { return false; }
void run(const Job&, int) {}
void pack(const Filters&, std::uint16_t*, int) {}

#endif

}  // namespace pbe::conv3x3
