#include "affine_relu/native.h"
#include "conv3x3/native.h"
#include "halves.h"

// Values are compared with the reference in Python; here it is the memory that is watched.
TEST(conv3x3_stays_inside_its_buffers) {
  namespace op = pbe::conv3x3;
  if (!op::is_supported()) return;
  struct Shape {
    std::int64_t images, height, width, in, out;
  };
  for (const Shape& s : {Shape{0, 4, 4, 16, 16}, Shape{1, 1, 1, 1, 1}, Shape{2, 7, 9, 24, 40}, Shape{3, 8, 8, 16, 16},
                         Shape{1, 5, 2, 17, 64}, Shape{2, 33, 47, 3, 33}, Shape{9, 4, 4, 130, 128}}) {
    const std::int64_t pixels = s.images * s.height * s.width;
    const auto x = halves(pixels * s.in, 1), mask = halves(pixels * s.in, 2), residual = halves(pixels * s.out, 3);
    const auto weight = uniform(s.out * s.in * 9, -0.1f, 0.1f, 4), bias = uniform(s.out, -1.0f, 1.0f, 5);
    const std::int64_t size = op::packed_size(s.out, s.in);
    const auto packed = buffer<std::uint16_t>(size);
    op::pack({weight.get(), s.out, s.in, s.out, s.out * s.in, false}, packed.get(), 3);
    CHECK(all_finite(packed.get(), size));
    const auto transposed = buffer<std::uint16_t>(op::packed_size(s.in, s.out));
    op::pack({weight.get(), s.in, s.out, 9 * s.in, s.in, true}, transposed.get(), 3);
    for (int variant = 0; variant < 16; ++variant) {
      const auto y = buffer<std::uint16_t>(pixels * s.out);
      for (std::int64_t i = 0; i < pixels * s.out; ++i) y[i] = 0x7fc0;
      const op::Job job{x.get(),
                        variant & 1 ? mask.get() : nullptr,
                        packed.get(),
                        variant & 2 ? bias.get() : nullptr,
                        variant & 4 ? residual.get() : nullptr,
                        y.get(),
                        s.images,
                        s.height,
                        s.width,
                        s.in,
                        s.out,
                        (variant & 8) != 0};
      op::run(job, 3);
      CHECK(all_finite(y.get(), pixels * s.out));
    }
  }
}

TEST(affine_relu_stays_inside_its_buffers) {
  namespace op = pbe::affine_relu;
  if (!op::is_supported()) return;
  for (const std::int64_t channels : {0, 1, 16, 33, 40000}) {
    for (const std::int64_t pixels : {0, 1, 7}) {
      const std::int64_t n = pixels * channels;
      const auto x = halves(n, 1), grad = halves(n, 2), beside = halves(n, 5);
      const auto scale = uniform(channels, 0.5f, 1.0f, 3), shift = uniform(channels, -1.0f, 1.0f, 4);
      const auto y = buffer<std::uint16_t>(n), out = buffer<std::uint16_t>(n);
      op::run({pbe::DType::bf16, pixels, channels, true}, x.get(), scale.get(), shift.get(), y.get(), 3);
      for (int variant = 0; variant < 4; ++variant) {
        for (std::int64_t i = 0; i < n; ++i) out[i] = 0x7fc0;
        op::backward(
            {grad.get(), y.get(), variant & 1 ? beside.get() : nullptr, variant & 2 ? scale.get() : nullptr, out.get()},
            pixels, channels, 3);
        CHECK(all_finite(y.get(), n) && all_finite(out.get(), n));
      }
    }
  }
}
