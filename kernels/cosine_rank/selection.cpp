// A radix search for the n-th smallest key, then one sweep that writes the indices below it.
#include <algorithm>
#include <array>
#include <vector>

#include "cosine_rank/native.h"
#include "parallel.h"

namespace pbe::cosine_rank {
namespace {

// Under this many elements a second thread costs more than it brings.
constexpr std::int64_t kGrain = 16384;
constexpr std::uint32_t kLast = 0xffffffffu;
constexpr int kTopBits = 10;  // leaves 22: two more digits of 11
constexpr int kDigitBits = 11;

// Unsigned integers in the order of the floats; -0 is 0, and NaN and infinities are the largest.
PBE_INLINE std::uint32_t key_of(float value) {
  const std::uint32_t bits = bits_of_float(value + 0.0f);
  const std::uint32_t flip = static_cast<std::uint32_t>(-static_cast<std::int32_t>(bits >> 31)) | 0x80000000u;
  return (bits & 0x7f800000u) == 0x7f800000u ? kLast : bits ^ flip;
}

using Histogram = std::array<std::int64_t, 1 << kDigitBits>;

struct Part {
  std::int64_t begin, end;
  Histogram top{};
  std::int64_t below = 0, equal = 0;  // keys under and at the threshold
  std::int64_t candidates = 0, offset = 0, ties = 0;
};

PBE_CLONES void count_top(const float* values, Part& part) {
  // Neighbours tend to share a bucket, and an increment waits for the last one of its bucket: two sets of buckets.
  Histogram odd{};
  std::int64_t i = part.begin;
  for (; i + 1 < part.end; i += 2) {
    ++part.top[key_of(values[i]) >> (32 - kTopBits)];
    ++odd[key_of(values[i + 1]) >> (32 - kTopBits)];
  }
  if (i < part.end) ++part.top[key_of(values[i]) >> (32 - kTopBits)];
  for (int bucket = 0; bucket < 1 << kTopBits; ++bucket) part.top[bucket] += odd[bucket];
}

// The keys in one bucket of the top digit; `out` has room for one more.
PBE_CLONES void gather(const float* values, const Part& part, std::uint32_t bucket, std::uint32_t* out) {
  for (std::int64_t i = part.begin; i < part.end; ++i) {
    const std::uint32_t key = key_of(values[i]);
    *out = key;
    out += key >> (32 - kTopBits) == bucket;
  }
}

PBE_CLONES void count_below(const float* values, Part& part, std::uint32_t threshold) {
  std::int64_t below = 0, equal = 0;
  for (std::int64_t i = part.begin; i < part.end; ++i) {
    const std::uint32_t key = key_of(values[i]);
    below += key < threshold;
    equal += key == threshold;
  }
  part.below = below;
  part.equal = equal;
}

PBE_CLONES void write_indices(const float* values, const Part& part, std::uint32_t threshold, std::int64_t* out) {
  std::int64_t ties = part.ties;
  std::int64_t* const last = out + part.below + ties;
  for (std::int64_t i = part.begin; out < last; ++i) {
    const std::uint32_t key = key_of(values[i]);
    const bool tie = (key == threshold) & (ties > 0);
    *out = i;
    out += (key < threshold) | tie;
    ties -= tie;
  }
}

// The bucket that holds the rank-th key (from 0); rank becomes its place in that bucket.
template <class Counts>
std::uint32_t find_bucket(const Counts& count_of, std::int64_t& rank) {
  std::uint32_t bucket = 0;
  for (std::int64_t count; rank >= (count = count_of(bucket)); ++bucket) rank -= count;
  return bucket;
}

std::uint32_t nth_key(std::vector<std::uint32_t>& keys, std::int64_t rank, std::uint32_t prefix) {
  for (int shift = 32 - kTopBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    Histogram counts{};
    const auto digit = [shift](std::uint32_t key) { return (key >> shift) & ((1u << kDigitBits) - 1); };
    for (const std::uint32_t key : keys) ++counts[digit(key)];
    const std::uint32_t bucket = find_bucket([&](std::uint32_t b) { return counts[b]; }, rank);
    keys.erase(std::remove_if(keys.begin(), keys.end(), [&](std::uint32_t key) { return digit(key) != bucket; }),
               keys.end());
    prefix = prefix << kDigitBits | bucket;
  }
  return prefix;
}

}  // namespace

void select_smallest(const float* values, std::int64_t count, std::int64_t n, std::int64_t* out, int threads) {
  if (n <= 0) return;
  std::vector<Part> parts(static_cast<std::size_t>(std::clamp<std::int64_t>(count / kGrain, 1, std::max(threads, 1))));
  const std::int64_t size = static_cast<std::int64_t>(parts.size());
  for (std::int64_t p = 0; p < size; ++p) {
    parts[p].begin = count * p / size;
    parts[p].end = count * (p + 1) / size;
  }
  const auto in_parallel = [&](const auto& body) {
    parallel_for(size, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) body(parts[p]);
    });
  };

  in_parallel([&](Part& part) { count_top(values, part); });
  std::int64_t rank = n - 1;
  const auto in_all_parts = [&](std::uint32_t bucket) {
    std::int64_t total = 0;
    for (const Part& part : parts) total += part.top[bucket];
    return total;
  };
  const std::uint32_t bucket = find_bucket(in_all_parts, rank);

  // One slot more for each part, which `gather` may write past its last key.
  std::vector<std::uint32_t> keys(static_cast<std::size_t>(in_all_parts(bucket) + size));
  std::int64_t offset = 0;
  for (Part& part : parts) {
    part.candidates = part.top[bucket];
    part.offset = offset;
    offset += part.candidates + 1;
  }
  in_parallel([&](Part& part) { gather(values, part, bucket, keys.data() + part.offset); });
  for (std::int64_t p = size - 1; p >= 0; --p) keys.erase(keys.begin() + parts[p].offset + parts[p].candidates);
  const std::uint32_t threshold = nth_key(keys, rank, bucket);

  in_parallel([&](Part& part) { count_below(values, part, threshold); });
  std::int64_t below = 0;
  for (const Part& part : parts) below += part.below;
  std::int64_t ties = n - below;
  offset = 0;
  for (Part& part : parts) {
    part.ties = std::min(ties, part.equal);
    ties -= part.ties;
    part.offset = offset;
    offset += part.below + part.ties;
  }
  in_parallel([&](Part& part) { write_indices(values, part, threshold, out + part.offset); });
}

}  // namespace pbe::cosine_rank
