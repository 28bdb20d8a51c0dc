#include "conv_grad/native.h"
#include "halves.h"

// Values are compared with the reference in Python; here it is the memory that is watched.
TEST(conv_grad_stays_inside_its_buffers) {
  namespace op = pbe::conv_grad;
  if (!op::is_supported()) return;
  struct Shape {
    std::int64_t images, height, width, in, out, beside, kernel, stride, padding;
  };
  for (const Shape& s :
       {Shape{0, 4, 4, 16, 16, 0, 3, 2, 1}, Shape{1, 1, 1, 1, 1, 1, 1, 1, 0}, Shape{2, 16, 16, 16, 32, 32, 3, 2, 1},
        Shape{2, 33, 47, 3, 33, 0, 7, 2, 3}, Shape{3, 32, 32, 3, 16, 0, 3, 1, 1}, Shape{1, 7, 9, 64, 17, 5, 3, 3, 1},
        Shape{1, 9, 6, 5, 130, 0, 2, 3, 1}, Shape{2, 11, 5, 130, 3, 7, 5, 4, 2}, Shape{1, 1, 20, 17, 2, 0, 1, 5, 0},
        Shape{1, 112, 112, 8, 24, 24, 3, 2, 1}}) {
    const std::int64_t down = (s.height + 2 * s.padding - s.kernel) / s.stride + 1;
    const std::int64_t across = (s.width + 2 * s.padding - s.kernel) / s.stride + 1;
    const std::int64_t pixels = s.images * down * across, size = s.images * s.height * s.width * s.in;
    const auto grad = halves(pixels * s.out, 1), mask = halves(pixels * s.out, 2);
    const auto beside = halves(pixels * s.beside, 3);
    for (int variant = 0; variant < 4; ++variant) {
      const bool is_pair = (variant & 2) != 0 && s.beside > 0;
      op::Job job{};
      job.grad = grad.get();
      job.mask = variant & 1 ? mask.get() : nullptr;
      job.grad_beside = is_pair ? beside.get() : nullptr;
      job.images = s.images, job.height = s.height, job.width = s.width, job.channels_in = s.in;
      job.height_out = down, job.width_out = across, job.channels = s.out, job.channels_beside = is_pair ? s.beside : 0;
      job.kernel = s.kernel, job.stride = s.stride, job.padding = s.padding;
      const auto packed = halves(op::packed_size(job), 4);
      const auto out = buffer<std::uint16_t>(size);
      for (std::int64_t i = 0; i < size; ++i) out[i] = 0x7fc0;
      job.packed = packed.get();
      job.grad_images = out.get();
      op::run(job, 3);
      CHECK(all_finite(out.get(), size));
    }
  }
}
