// A 3 x 3 convolution on the CPU by Winograd's F(2 x 2, 3 x 3), in bfloat16; reference.py is the definition.
#pragma once

#include <cstdint>

namespace pbe::conv3x3 {

// Channels come in groups of this many, the last one filled up with zeros.
constexpr std::int64_t kGroup = 16;

inline std::int64_t groups_of(std::int64_t channels) { return (channels + kGroup - 1) / kGroup; }

// bfloat16 numbers in the packed weight of a convolution.
inline std::int64_t packed_size(std::int64_t channels_out, std::int64_t channels_in) {
  return groups_of(channels_out) * kGroup * groups_of(channels_in) * kGroup * 16;
}

// y = activation(filters * (x where mask > 0) + bias + residual); what is null is left out.
struct Job {
  const std::uint16_t* x;         // (images, height, width, channels_in) bfloat16
  const std::uint16_t* mask;      // likewise, or null
  const std::uint16_t* packed;    // see pack
  const float* bias;              // (channels_out,), or null
  const std::uint16_t* residual;  // as y, or null
  std::uint16_t* y;               // (images, height, width, channels_out) bfloat16
  std::int64_t images, height, width, channels_in, channels_out;
  bool relu;
};

// Whether this processor has the instructions (level bf16); without them none of the functions below may be called.
bool is_supported();

void run(const Job& job, int threads);

// 3 x 3 filters whose channels out lie side by side, to be rotated by half a turn or not.
struct Filters {
  const float* weight;
  std::int64_t channels_out, channels_in, channel_stride, tap_stride;  // strides: of the channels in, of the 9 taps
  bool rotated;
};

// The transformed filters as `run` reads them: (groups out, 16 positions, pairs of channels in, 16 channels out, 2).
void pack(const Filters& filters, std::uint16_t* packed, int threads);

}  // namespace pbe::conv3x3
