#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "check.h"
#include "cosine_rank/native.h"

using pbe::DType;
using pbe::cosine_rank::Logits;

namespace {

// Rows of logits that end where their buffer ends and start where it starts.
struct Block {
  std::unique_ptr<std::uint8_t[]> bytes;
  Logits logits;
  std::unique_ptr<float[]> values;  // what the elements are in float32

  Block(std::int64_t rows, std::int64_t classes, std::int64_t stride, DType type, unsigned seed) {
    const std::int64_t n = rows > 0 ? (rows - 1) * stride + classes : 0;
    values = uniform(n, -4.0f, 4.0f, seed);
    bytes = buffer<std::uint8_t>(n * pbe::size_of(type));
    pbe::narrow(values.get(), bytes.get(), type, n);
    pbe::widen(bytes.get(), type, values.get(), n);
    logits = Logits{bytes.get(), type, stride};
  }
  const float* row(std::int64_t i) const { return values.get() + i * logits.stride; }
};

double expected(const float* a, const float* b, std::int64_t classes) {
  double aa = 0, bb = 0, sum = 0;
  for (std::int64_t k = 0; k < classes; ++k) aa += double(a[k]) * a[k], bb += double(b[k]) * b[k];
  for (std::int64_t k = 0; k < classes; ++k) {
    const double difference = a[k] / std::sqrt(aa) - b[k] / std::sqrt(bb);
    sum += difference * difference;
  }
  return 0.5 * sum;
}

}  // namespace

TEST(cosine_distance_stays_inside_its_buffers_and_is_right) {
  const DType types[] = {DType::f32, DType::f16, DType::bf16};
  for (const std::int64_t rows : {0, 1, 3, 4, 63, 1000}) {
    for (const std::int64_t classes : {1, 2, 3, 4, 7, 10, 23, 24, 25, 43, 200}) {
      for (int variant = 0; variant < 9 * 3; ++variant) {
        const std::int64_t pad_a = variant / 9, pad_b = variant / 9 == 1 ? 0 : variant / 9;
        const Block a(rows, classes, classes + pad_a, types[variant % 3], 1);
        // A stride of zero, as of an expanded row, where the rows are few.
        const Block b(rows, classes, rows == 3 ? 0 : classes + pad_b, types[variant / 3 % 3], 2);
        auto out = buffer<float>(rows);
        std::fill_n(out.get(), rows, NAN);
        pbe::cosine_rank::distance(a.logits, b.logits, rows, classes, out.get(), 1 + variant % 3);
        for (std::int64_t i = 0; i < rows; ++i) {
          CHECK(std::fabs(out[i] - expected(a.row(i), b.row(i), classes)) <= 2e-15 + 1.2e-7 * out[i]);
        }
      }
    }
  }
}

TEST(select_smallest_matches_a_stable_sort) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const std::int64_t count : {0, 1, 2, 63, 1000, 70000}) {
    for (int variant = 0; variant < 4; ++variant) {
      auto values = uniform(count, 0.0f, variant == 0 ? 1e-3f : 2.0f, 3);
      for (std::int64_t i = 0; i < count; ++i) {
        if (variant == 1) values[i] = std::floor(values[i] * 2.0f);  // ties
        if (variant == 2) values[i] = 0.5f;
        if (variant == 3)
          values[i] = i % 5 == 0 ? NAN : i % 7 == 0 ? -infinity : i % 11 == 0 ? -0.0f : values[i] - 1.0f;
      }
      std::vector<std::int64_t> order(static_cast<std::size_t>(count));
      std::iota(order.begin(), order.end(), 0);
      const auto finite = [&](std::int64_t i) { return std::isfinite(values[i]) ? values[i] : infinity; };
      std::stable_sort(order.begin(), order.end(), [&](auto i, auto j) { return finite(i) < finite(j); });
      for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, count / 3, count * 7 / 10, count}) {
        if (n > count) continue;
        std::vector<std::int64_t> wanted(order.begin(), order.begin() + n);
        std::sort(wanted.begin(), wanted.end());
        for (const int threads : {1, 3}) {
          const auto out = buffer<std::int64_t>(n);
          pbe::cosine_rank::select_smallest(values.get(), count, n, out.get(), threads);
          CHECK(std::equal(wanted.begin(), wanted.end(), out.get()));
        }
      }
    }
  }
}
