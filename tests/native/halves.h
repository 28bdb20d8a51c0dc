// Buffers of bfloat16 numbers.
#pragma once

#include <cmath>

#include "check.h"
#include "convert.h"

inline std::unique_ptr<std::uint16_t[]> halves(std::int64_t n, unsigned seed) {
  const auto values = uniform(n, -1.0f, 1.0f, seed);
  auto out = buffer<std::uint16_t>(n);
  pbe::narrow(values.get(), out.get(), pbe::DType::bf16, n);
  return out;
}

inline bool all_finite(const std::uint16_t* values, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    if (!std::isfinite(pbe::from_bf16(values[i]))) return false;
  return true;
}
