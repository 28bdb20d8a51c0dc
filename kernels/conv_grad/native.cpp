#include "conv_grad/native.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bf16_avx512.h"
#include "parallel.h"

namespace pbe::conv_grad {

#ifdef PBE_X86
namespace {

using avx512::first_lanes;
using bf16::narrow;
using bf16::pair;

// Lines of gradients that one thread has before it: they and what is written from them fit into its second-level cache.
constexpr std::int64_t kScratchBytes = 1 << 16;
// What may be read past the last line.
constexpr std::int64_t kSlack = 32;

std::int64_t up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step; }

// Pixels of the images whose coordinates leave the same remainders by the stride are reached by the same taps: pixel
// (row + stride y, column + stride x) by `rows` lines of the outputs, from first_row + y on, of each `columns`
// neighbours from first_column + x on, which lie side by side in memory. Of images with few channels the sums of
// `unit` neighbours fill one register.
struct Phase {
  std::int64_t row, column, first_row, rows, first_column, columns;
  const std::uint16_t* packed = nullptr;
  // Pairs of numbers in a line, in a register's filters, and in the line of the convolution beside.
  std::int64_t pairs = 0, panel = 0, pairs_beside = 0;
  // Of every unit: where it reads in the scratch memory, from `beside` of the other convolution, and where it writes,
  // from the block's first line on. The units of fewer lines are the first of these.
  std::vector<std::int64_t> from, beside, to;
  std::int64_t units_across = 0;
};

struct Plan {
  std::vector<Phase> phases;
  std::int64_t unit, groups;
  // The lines and columns of outputs that any phase reads for y = x = 0; the last one is not among them.
  std::int64_t row_begin, row_end, column_begin, column_end;
  // Lines y of a block, and of an image; numbers in a line of the scratch memory, and of the one beside it.
  std::int64_t block, down, line, line_beside;
};

// Tap t of line r of the images is of line (r + padding - t) / stride of the outputs, where that is whole: of lines
// with one remainder the taps are `first`, first + stride, ..., and their lines of outputs neighbours, in falling
// order.
void find_taps(const Job& job, std::int64_t remainder, std::int64_t& from, std::int64_t& count) {
  const std::int64_t first = (remainder + job.padding) % job.stride;
  count = first < job.kernel ? (job.kernel - first - 1) / job.stride + 1 : 0;
  from = (remainder + job.padding - first) / job.stride - (count - 1);
}

void fill_units(const Job& job, const Plan& plan, Phase& phase) {
  phase.units_across = up(up(job.width - phase.column, job.stride), plan.unit);
  for (std::int64_t y = 0; y < plan.block; ++y) {
    for (std::int64_t x = 0; x < phase.units_across * plan.unit; x += plan.unit) {
      const std::int64_t column = phase.first_column + x - plan.column_begin;
      phase.from.push_back((y + phase.first_row - plan.row_begin) * plan.line + column * job.channels);
      phase.beside.push_back(y * plan.line_beside + x * job.channels_beside);
      phase.to.push_back(((y * job.stride + phase.row) * job.width + x * job.stride + phase.column) * job.channels_in);
    }
  }
}

Plan plan_of(const Job& job) {
  Plan plan{};
  plan.unit = std::max<std::int64_t>(1, kGroup / job.channels_in);
  plan.groups = up(plan.unit * job.channels_in, kGroup);
  plan.row_begin = plan.column_begin = job.height_out + job.width_out;
  plan.row_end = plan.column_end = -plan.row_begin;
  const std::uint16_t* packed = job.packed;
  for (std::int64_t y = 0; y < job.stride; ++y) {
    for (std::int64_t x = 0; x < job.stride; ++x) {
      Phase phase{};
      phase.row = y, phase.column = x;
      find_taps(job, y, phase.first_row, phase.rows);
      find_taps(job, x, phase.first_column, phase.columns);
      phase.columns += phase.columns == 0 ? 0 : plan.unit - 1;
      if (phase.columns == 0) phase.rows = 0;
      phase.pairs = up(phase.columns * job.channels, 2);
      if (x == 0 && y == 0 && job.grad_beside != nullptr) phase.pairs_beside = up(plan.unit * job.channels_beside, 2);
      phase.panel = (phase.rows * phase.pairs + phase.pairs_beside) * 2 * kGroup;
      phase.packed = packed;
      packed += plan.groups * phase.panel;
      if (phase.rows > 0) {
        plan.row_begin = std::min(plan.row_begin, phase.first_row);
        plan.row_end = std::max(plan.row_end, phase.first_row + phase.rows);
        plan.column_begin = std::min(plan.column_begin, phase.first_column);
        plan.column_end = std::max(plan.column_end, phase.first_column + phase.columns);
      }
      plan.phases.push_back(phase);
    }
  }
  plan.down = up(job.height, job.stride);
  const std::int64_t across = up(up(job.width, job.stride), plan.unit) * plan.unit;
  plan.line = (across - 1 + plan.column_end - plan.column_begin) * job.channels;
  plan.line_beside = across * job.channels_beside;
  const std::int64_t lines = kScratchBytes / 2 / (plan.line + plan.line_beside);
  plan.block = std::clamp<std::int64_t>(lines - (plan.row_end - plan.row_begin) + 1, 1, plan.down);
  for (Phase& phase : plan.phases) fill_units(job, plan, phase);
  return plan;
}

// Lines of gradients, and the part of them that a block needs.
struct Lines {
  const std::uint16_t* data;
  const std::uint16_t* mask;
  std::int64_t height, width, channels;
  std::int64_t first_row, rows, first_column, columns;
};

// With zeros around them, and where the mask is not above zero. Returns what follows the last line.
PBE_BF16 std::uint16_t* copy_lines(const Lines& lines, std::int64_t image, std::uint16_t* to) {
  const std::int64_t begin = std::clamp<std::int64_t>(-lines.first_column, 0, lines.columns);
  const std::int64_t end = std::clamp<std::int64_t>(lines.width - lines.first_column, begin, lines.columns);
  const std::int64_t left = begin * lines.channels, size = (end - begin) * lines.channels;
  const std::int64_t all = lines.columns * lines.channels;
  for (std::int64_t i = 0; i < lines.rows; ++i, to += all) {
    const std::int64_t row = lines.first_row + i;
    if (row < 0 || row >= lines.height || size == 0) {
      std::fill_n(to, all, std::uint16_t{0});
      continue;
    }
    const std::int64_t at = ((image * lines.height + row) * lines.width + lines.first_column + begin) * lines.channels;
    std::fill_n(to, left, std::uint16_t{0});
    std::fill_n(to + left + size, all - left - size, std::uint16_t{0});
    if (lines.mask == nullptr) {
      std::memcpy(to + left, lines.data + at, static_cast<std::size_t>(size) * 2);
      continue;
    }
    for (std::int64_t k = 0; k < size; k += kGroup) {
      const __mmask16 inside = first_lanes(size - k);
      const __mmask16 passes = avx512::above_zero(lines.mask + at + k, inside);
      _mm256_mask_storeu_epi16(to + left + k, inside, _mm256_maskz_loadu_epi16(passes, lines.data + at + k));
    }
  }
  return to;
}

// sums += the numbers from left[i] on, pair by pair, times `Registers` registers of filters, which lie `panel` apart.
template <int Height, int Registers>
PBE_BF16 PBE_INLINE void add_products(const std::uint16_t* const left[Height], std::int64_t pairs,
                                      const std::uint16_t* right, std::int64_t panel, __m512 sums[Height][Registers]) {
  for (std::int64_t k = 0; k < pairs; ++k, right += 2 * kGroup) {
    __m512bh filters[Registers];
    for (int j = 0; j < Registers; ++j) filters[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + j * panel));
#pragma GCC unroll 8
    for (int i = 0; i < Height; ++i) {
      const __m512bh both = pair(left[i] + 2 * k);
      for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, filters[j]);
    }
  }
}

// The gradient of `count` units, from channel group `group` on.
template <int Height, int Registers>
PBE_BF16 void multiply(const Job& job, const Plan& plan, const Phase& phase, std::int64_t count, std::int64_t group,
                       const std::uint16_t* lines, const std::uint16_t* beside, std::uint16_t* out) {
  const std::uint16_t* const filters = phase.packed + group * phase.panel;
  for (std::int64_t first = 0; first < count; first += Height) {
    const std::uint16_t* left[Height];
    // The last unit fills up the last block.
    const auto at = [&](int i) { return static_cast<std::size_t>(std::min(first + i, count - 1)); };
    for (int i = 0; i < Height; ++i) left[i] = lines + phase.from[at(i)];
    __m512 sums[Height][Registers];
    for (int i = 0; i < Height; ++i)
      for (int j = 0; j < Registers; ++j) sums[i][j] = _mm512_setzero_ps();
    const std::uint16_t* right = filters;
    for (std::int64_t row = 0; row < phase.rows; ++row, right += phase.pairs * 2 * kGroup) {
      add_products<Height, Registers>(left, phase.pairs, right, phase.panel, sums);
      for (int i = 0; i < Height; ++i) left[i] += plan.line;
    }
    if (phase.pairs_beside > 0) {
      for (int i = 0; i < Height; ++i) left[i] = beside + phase.beside[at(i)];
      add_products<Height, Registers>(left, phase.pairs_beside, right, phase.panel, sums);
    }
    const int here = static_cast<int>(std::min<std::int64_t>(Height, count - first));
    for (int i = 0; i < here; ++i) {
      std::uint16_t* const to = out + phase.to[at(i)];
      if (plan.unit == 1) {
        for (int j = 0; j < Registers; ++j) {
          const __mmask16 lanes = first_lanes(job.channels_in - (group + j) * kGroup);
          _mm256_mask_storeu_epi16(to + (group + j) * kGroup, lanes, narrow(sums[i][j]));
        }
        continue;
      }
      const std::int64_t x = (first + i) % phase.units_across * plan.unit * job.stride + phase.column;
      const std::int64_t pixels = std::min(plan.unit, up(job.width - x, job.stride));
      if (job.stride == 1) {
        _mm256_mask_storeu_epi16(to, first_lanes(pixels * job.channels_in), narrow(sums[i][0]));
        continue;
      }
      alignas(32) std::uint16_t values[kGroup];
      _mm256_store_si256(reinterpret_cast<__m256i*>(values), narrow(sums[i][0]));
      for (std::int64_t p = 0; p < pixels; ++p)
        std::memcpy(to + p * job.stride * job.channels_in, values + p * job.channels_in,
                    static_cast<std::size_t>(job.channels_in) * 2);
    }
  }
}

void multiply(const Job& job, const Plan& plan, const Phase& phase, std::int64_t count, const std::uint16_t* lines,
              const std::uint16_t* beside, std::uint16_t* out) {
  if (count == 0) return;
  for (std::int64_t group = 0; group < plan.groups;) {
    const std::int64_t left = plan.groups - group;
    const int registers = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto run = registers == 4 ? multiply<4, 4> : registers == 2 ? multiply<8, 2> : multiply<8, 1>;
    run(job, plan, phase, count, group, lines, beside, out);
    group += registers;
  }
}

void run_rows(const Job& job, const Plan& plan, std::int64_t begin, std::int64_t end) {
  static thread_local std::vector<std::uint16_t> scratch;
  const std::int64_t halo = plan.row_end - plan.row_begin - 1;
  scratch.resize(
      static_cast<std::size_t>((plan.block + halo) * plan.line + plan.block * plan.line_beside + 2 * kSlack));
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t image = at / plan.down, first = at % plan.down;
    const std::int64_t rows = std::min({plan.block, plan.down - first, end - at});
    std::uint16_t* const beside =
        copy_lines({job.grad, job.mask, job.height_out, job.width_out, job.channels, first + plan.row_begin,
                    rows + halo, plan.column_begin, plan.line / job.channels},
                   image, scratch.data());
    std::uint16_t* last = beside;
    if (job.grad_beside != nullptr)
      last = copy_lines({job.grad_beside, nullptr, job.height_out, job.width_out, job.channels_beside, first, rows, 0,
                         plan.line_beside / job.channels_beside},
                        image, beside);
    std::fill_n(last, kSlack, std::uint16_t{0});
    std::uint16_t* const out =
        job.grad_images + (image * job.height + first * job.stride) * job.width * job.channels_in;
    for (const Phase& phase : plan.phases) {
      const std::int64_t lines = std::min(rows, up(job.height - phase.row, job.stride) - first);
      multiply(job, plan, phase, std::max<std::int64_t>(lines, 0) * phase.units_across, scratch.data(), beside, out);
    }
    at += rows;
  }
}

}  // namespace

bool is_supported() { return level() >= Level::bf16; }

void run(const Job& job, int threads) {
  const Plan plan = plan_of(job);
  parallel_for(job.images * plan.down, plan.block, threads,
               [&](std::int64_t begin, std::int64_t end) { run_rows(job, plan, begin, end); });
}

std::int64_t packed_size(const Job& job) {
  const Plan plan = plan_of(job);
  std::int64_t size = 0;
  for (const Phase& phase : plan.phases) size += plan.groups * phase.panel;
  return size;
}

#else

bool is_supported() { return false; }
void run(const Job&, int) {}
std::int64_t packed_size(const Job&) { return 0; }

#endif

}  // namespace pbe::conv_grad
