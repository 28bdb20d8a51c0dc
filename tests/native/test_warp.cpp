#include <algorithm>
#include <cmath>

#include "check.h"
#include "warp/native.h"
#include "warp/sampling.h"

using pbe::DType;
namespace warp = pbe::warp;

namespace {

struct Shape {
  std::int64_t batch, channels, height, width;
};

const Shape kShapes[] = {{0, 3, 4, 4},   {2, 0, 4, 4},   {1, 1, 1, 1},    {3, 2, 1, 9},   {2, 3, 9, 1},  {2, 1, 2, 2},
                         {5, 3, 28, 28}, {2, 3, 33, 47}, {1, 3, 100, 90}, {1, 600, 3, 5}, {2, 1, 3, 40}, {1, 5, 4, 32}};

// Offsets near the pixel itself (rough = 0) or anywhere; never further than the last one that may be read.
std::unique_ptr<std::int32_t[]> offsets_of(const warp::Plane& plane, std::int64_t n, int rough, unsigned seed) {
  const auto noise = uniform(n, -1.0f, 1.0f, seed);
  auto offsets = buffer<std::int32_t>(n);
  const std::int64_t last = plane.size - 1 - plane.right - plane.down;
  for (std::int64_t i = 0; i < n; ++i) {
    const float far = noise[i] * (rough == 0 ? 1.5f : rough == 1 ? 40.0f : static_cast<float>(plane.size));
    offsets[i] = static_cast<std::int32_t>(std::clamp(i + static_cast<std::int64_t>(far), std::int64_t{0}, last));
  }
  return offsets;
}

}  // namespace

// Values are compared with the reference in Python; here it is the memory that is watched, and that constant images,
// which every weighting with a sum of one leaves alone, come out whole.
TEST(warp_stays_inside_its_buffers) {
  const DType outs[] = {DType::f32, DType::f16, DType::bf16, DType::u8};
  for (const Shape& shape : kShapes) {
    const std::int64_t pixels = shape.height * shape.width, n = shape.batch * shape.channels * pixels;
    const bool wide = shape.width > 1, high = shape.height > 1;
    const auto row = static_cast<std::int32_t>(shape.width);
    const warp::Plane plane{pixels, row, wide, high ? row : 0};
    for (int variant = 0; variant < 4 * 2 * 2 * 3 * 2; ++variant) {
      const DType out_type = outs[variant % 4];
      const DType in_type = variant / 4 % 2 || out_type == DType::u8 ? DType::u8 : DType::f32;
      const bool channels_last = variant / 8 % 2, noisy = variant / 48 % 2;
      const auto offsets = offsets_of(plane, pixels, variant / 16 % 3, static_cast<unsigned>(variant));
      auto weights = uniform(4 * pixels, 0.0f, 0.25f, 1);
      for (std::int64_t i = 0; i < pixels; ++i) {
        weights[3 * pixels + i] = 1.0f - weights[i] - weights[pixels + i] - weights[2 * pixels + i];
      }
      auto in = buffer<std::uint8_t>(n * pbe::size_of(in_type));
      auto out = buffer<std::uint8_t>(n * pbe::size_of(out_type));
      const float value = in_type == DType::u8 ? 200.0f : 0.75f;
      for (std::int64_t i = 0; i < n; ++i) {
        if (in_type == DType::u8) {
          in[i] = 200;
        } else {
          reinterpret_cast<float*>(in.get())[i] = value;
        }
      }
      const auto mean = uniform(shape.channels, 0.5f, 0.5f, 4), std = uniform(shape.channels, 0.5f, 0.5f, 5);
      const bool normalised = out_type != DType::u8;
      const warp::Images images{in.get(),
                                out.get(),
                                in_type,
                                out_type,
                                shape.batch,
                                shape.channels,
                                shape.height,
                                shape.width,
                                channels_last,
                                normalised ? mean.get() : nullptr,
                                normalised ? std.get() : nullptr};
      if (noisy) {
        auto grid = uniform(2 * pixels, -1.2f, 1.2f, 6);
        if (pixels > 3) grid[0] = NAN, grid[3] = INFINITY, grid[5] = -1e30f;
        auto ids = buffer<std::int64_t>(shape.batch);
        for (std::int64_t i = 0; i < shape.batch; ++i) ids[i] = -i;
        warp::run_noise(images, grid.get(), 0.1f, ids.get(), ~0ull >> 1, 3);
      } else {
        CHECK(warp::run(images, offsets.get(), weights.get(), 3));
      }
      const float expected = !normalised ? value : ((in_type == DType::u8 ? value / 255.0f : value) - 0.5f) / 0.5f;
      auto result = buffer<float>(n);
      pbe::widen(out.get(), out_type, result.get(), n);
      for (std::int64_t i = 0; i < n; ++i) CHECK(std::abs(result[i] - expected) < 3e-3f);
    }
  }
}

TEST(warp_refuses_offsets_outside_of_the_plane) {
  const auto in = buffer<float>(12), out = buffer<float>(12), weights = uniform(48, 0.0f, 1.0f, 1);
  for (const std::int32_t wrong : {-1, 12 - 1 - 4, 1 << 30}) {
    auto offsets = buffer<std::int32_t>(12);
    std::fill_n(offsets.get(), 12, 0);
    offsets[11] = wrong;
    const warp::Images images{in.get(), out.get(), DType::f32, DType::f32, 1, 1, 3, 4, false, nullptr, nullptr};
    CHECK(!warp::run(images, offsets.get(), weights.get(), 1));
  }
}

// On processors without the instructions for windows both calls are the same.
TEST(warp_windows_change_nothing) {
  for (const Shape& shape : kShapes) {
    for (int rough = 0; rough < 3; ++rough) {
      for (const int lanes : {1, 3, 16}) {
        const auto row = static_cast<std::int32_t>(shape.width * lanes);
        const std::int64_t n = shape.height * row;
        const warp::Plane plane{n, row, shape.width > 1 ? lanes : 0, shape.height > 1 ? row : 0};
        const auto offsets = offsets_of(plane, n, rough, 7);
        const auto weights = uniform(4 * n, 0.0f, 1.0f, 8);
        const float* const weight = weights.get();
        const warp::Taps taps{offsets.get(), weight, n, n};
        const std::int64_t blocks = n / warp::kBlock;
        auto windows = buffer<warp::Window>(blocks);
        auto places = buffer<std::uint8_t>(blocks * warp::kBlock);
        const warp::Window* found = warp::has_windows() ? windows.get() : nullptr;
        const auto in = uniform(2 * n, 0.0f, 1.0f, 9);
        auto bytes = buffer<std::uint8_t>(2 * n);
        for (std::int64_t i = 0; i < 2 * n; ++i) bytes[i] = static_cast<std::uint8_t>(in[i] * 255.0f);
        auto with = buffer<float>(2 * n), without = buffer<float>(2 * n), sums = buffer<float>(n);
        warp::find_windows(taps, plane, warp::kColumns<float>, windows.get(), places.get());
        warp::sample(warp::Stack<float>{in.get(), n, with.get(), n, 2, pbe::DType::f32}, plane, taps, found,
                     places.get(), sums.get());
        warp::sample(warp::Stack<float>{in.get(), n, without.get(), n, 2, pbe::DType::f32}, plane, taps, nullptr,
                     nullptr, sums.get());
        CHECK(std::equal(with.get(), with.get() + 2 * n, without.get()));
        warp::find_windows(taps, plane, warp::kColumns<std::uint8_t>, windows.get(), places.get());
        warp::sample(warp::Stack<std::uint8_t>{bytes.get(), n, with.get(), n, 2, pbe::DType::f32}, plane, taps, found,
                     places.get(), sums.get());
        warp::sample(warp::Stack<std::uint8_t>{bytes.get(), n, without.get(), n, 2, pbe::DType::f32}, plane, taps,
                     nullptr, nullptr, sums.get());
        CHECK(std::equal(with.get(), with.get() + 2 * n, without.get()));
      }
    }
  }
}
