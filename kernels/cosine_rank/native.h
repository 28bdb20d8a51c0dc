// Cosine distances of logits and selection by them on the CPU; formulas and edge cases are in reference.py.
#pragma once

#include <cstdint>

#include "convert.h"

namespace pbe::cosine_rank {

// (rows, classes) logits; the values of a row lie side by side, the rows stride >= 0 elements apart.
struct Logits {
  const void* data;
  DType type;  // f32, f16 or bf16
  std::int64_t stride;
};

// out: rows values in [0, 2], or NaN. A row's result depends on that row alone, not on its place or the threads.
void distance(const Logits& a, const Logits& b, std::int64_t rows, std::int64_t classes, float* out, int threads);

// The indices of the n <= count smallest values, ascending by index; ties go to the lower index, NaN and infinities
// count as largest.
void select_smallest(const float* values, std::int64_t count, std::int64_t n, std::int64_t* out, int threads);

}  // namespace pbe::cosine_rank
