#include "native.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "sampling.h"

namespace pbe::warp {
namespace {

// Output elements worked on at a time: their taps and sums stay in a close cache, and rows are read in long runs.
constexpr std::int64_t kTile = 2048;
// Planes that are sampled together, each tap being loaded once for all of them.
constexpr std::int64_t kStack = 3;
// Images take their turn at one tile before the next tile is looked at. Their parts of two neighbouring tiles, which
// share rows, should stay in the second-level cache.
constexpr std::int64_t kGroupBytes = 1 << 20;
// Results of this size have left the caches before they are read: nor do they need to be fetched to be written.
constexpr std::int64_t kStreamBytes = 8 << 20;
// Under this many elements a second thread costs more than it brings.
constexpr std::int64_t kGrain = 16384;
// In larger planes find_windows could not divide in float32.
constexpr std::int64_t kLargestPlane = 1 << 22;
// reference.STREAM
constexpr std::uint32_t kStream = 0x57415250u;

// reference.axis_taps, without branches.
struct AxisTaps {
  std::int32_t first;
  float weight, next_weight;
};

PBE_INLINE AxisTaps axis_taps(float coordinate, std::int32_t size) {
  float position = (coordinate + 1.0f) * (static_cast<float>(size - 1) * 0.5f);
  position = position == position ? position : 0.0f;
  position = std::min(std::max(position, -2.0f), static_cast<float>(size));
  std::int32_t low = static_cast<std::int32_t>(position);
  low -= static_cast<float>(low) > position;
  const float fraction = position - static_cast<float>(low);
  const std::int32_t first = std::max(std::min(low, size - 2), 0);
  const float rest = 1.0f - fraction;
  return {first,
          first == low       ? rest
          : first == low + 1 ? fraction
                             : 0.0f,
          first + 1 == low ? rest
          : first == low   ? fraction
                           : 0.0f};
}

// Philox 4x32-10 for the counters (quad, kStream, id), one call per four pixels; words (4 * quads).
PBE_CLONES void random_words(std::uint32_t quad, std::int64_t quads, std::uint64_t id, std::uint64_t seed,
                             std::uint32_t* words) {
  for (std::int64_t i = 0; i < quads; ++i) {
    std::uint32_t c0 = quad + static_cast<std::uint32_t>(i), c1 = kStream;
    std::uint32_t c2 = static_cast<std::uint32_t>(id), c3 = static_cast<std::uint32_t>(id >> 32);
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t a = std::uint64_t{c0} * 0xD2511F53u, b = std::uint64_t{c2} * 0xCD9E8D57u;
      c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(b);
      c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

PBE_INLINE float moved(float coordinate, std::uint32_t half, float amplitude) {
  const float noise = static_cast<float>(static_cast<std::int32_t>(2 * half + 1)) * 0x1p-16f - 1.0f;
  const float value = coordinate + noise * amplitude;
  // NaN passes, as in torch.clamp.
  return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
}

// reference.taps of n pixels of the noisy grid.
PBE_CLONES void noisy_taps(const float* grid, const std::uint32_t* words, std::int64_t n, float amplitude,
                           std::int32_t height, std::int32_t width, std::int32_t* offset, float* const* weight) {
  float *upper_left = weight[0], *upper_right = weight[1], *lower_left = weight[2], *lower_right = weight[3];
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const AxisTaps x = axis_taps(moved(grid[2 * i], words[i] & 0xffffu, amplitude), width);
    const AxisTaps y = axis_taps(moved(grid[2 * i + 1], words[i] >> 16, amplitude), height);
    offset[i] = y.first * width + x.first;
    upper_left[i] = y.weight * x.weight;
    upper_right[i] = y.weight * x.next_weight;
    lower_left[i] = y.next_weight * x.weight;
    lower_right[i] = y.next_weight * x.next_weight;
  }
}

PBE_CLONES bool all_within(const std::int32_t* offsets, std::int64_t n, std::int32_t last) {
  std::int32_t low = 0, high = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    low = std::min(low, offsets[i]);
    high = std::max(high, offsets[i]);
  }
  return low >= 0 && high <= last;
}

// What does not change from tile to tile.
struct Job {
  const Images& images;
  std::int64_t pixels, tile_pixels, tiles;
  std::int64_t lanes;   // elements per pixel in one plane: 1, or the channels in channels_last
  std::int64_t planes;  // per image
  Plane plane;
  bool windows;
  bool streamed;
  std::vector<float> scale, shift;  // as Affine has them, of all channels or of a tile; empty: neither

  explicit Job(const Images& i) : images(i), pixels(i.height * i.width) {
    lanes = i.channels_last ? i.channels : 1;
    planes = i.channels_last ? 1 : i.channels;
    // Whole blocks of elements, and whole Philox calls.
    tile_pixels = std::max(kTile / lanes / kBlock, std::int64_t{1}) * kBlock;
    tiles = (pixels + tile_pixels - 1) / tile_pixels;
    const auto row = static_cast<std::int32_t>(i.width * lanes);
    plane = {pixels * lanes, row, i.width > 1 ? static_cast<std::int32_t>(lanes) : 0, i.height > 1 ? row : 0};
    windows = has_windows() && plane.size < kLargestPlane;
    const bool is_plain = i.out_type == DType::u8 || (i.in_type == DType::f32 && i.mean == nullptr);
    const std::int64_t out_bytes = i.batch * i.channels * pixels * size_of(i.out_type);
    streamed = is_plain && i.out_type == DType::f32 && out_bytes >= kStreamBytes && plane.size % kBlock == 0 &&
               reinterpret_cast<std::uintptr_t>(i.out) % (kBlock * sizeof(float)) == 0;
    if (is_plain) return;
    // A stack of planes may begin with the last channel.
    const std::int64_t repeats = lanes == 1 ? kBlock : 1;
    const std::int64_t count = lanes == 1 ? (i.channels + kStack - 1) * repeats : tile_pixels * lanes;
    const std::int64_t period = i.channels * repeats;
    scale.resize(static_cast<std::size_t>(count));
    shift.resize(scale.size());
    for (std::int64_t at = 0; at < period; ++at) {
      const std::int64_t channel = at / repeats;
      const float mean = i.mean == nullptr ? 0.0f : i.mean[channel];
      const float std = i.mean == nullptr ? 1.0f : i.std[channel];
      scale[at] = 1.0f / (i.in_type == DType::u8 ? std * 255.0f : std);
      shift[at] = -mean / std;
    }
    for (std::int64_t at = period; at < count; ++at) {
      scale[at] = scale[at - period];
      shift[at] = shift[at - period];
    }
  }
};

class Worker {
 public:
  explicit Worker(const Job& job)
      : job_(job),
        capacity_(job.tile_pixels * job.lanes),
        offset_(capacity_),
        weight_(4 * capacity_),
        windows_(capacity_ / kBlock),
        places_(capacity_),
        sums_(capacity_),
        words_(job.tile_pixels) {}

  void load_shared(std::int64_t tile, const std::int32_t* offsets, const float* weights) {
    const std::int64_t first = tile * job_.tile_pixels;
    const std::int64_t n = std::min(job_.tile_pixels, job_.pixels - first);
    set_taps(offsets + first, weights + first, job_.pixels, n);
    if (job_.windows && job_.images.in_type == DType::u8) drop_windows(taps_, windows_.data());
  }

  void load_noisy(std::int64_t tile, const float* grid, float amplitude, std::int64_t id, std::uint64_t seed) {
    const std::int64_t first = tile * job_.tile_pixels;
    const std::int64_t n = std::min(job_.tile_pixels, job_.pixels - first);
    random_words(static_cast<std::uint32_t>(first / 4), (n + 3) / 4, static_cast<std::uint64_t>(id), seed,
                 words_.data());
    // In channels_last the pixels' taps go to the end, to be spread out from the front.
    const std::int64_t at = capacity_ - job_.tile_pixels;
    float* const weight[4] = {row(0) + at, row(1) + at, row(2) + at, row(3) + at};
    noisy_taps(grid + 2 * first, words_.data(), n, amplitude, static_cast<std::int32_t>(job_.images.height),
               static_cast<std::int32_t>(job_.images.width), offset_.data() + at, weight);
    set_taps(offset_.data() + at, row(0) + at, capacity_, n);
  }

  // The loaded tile, of consecutive planes.
  void run(std::int64_t begin, std::int64_t end, std::int64_t tile) {
    const Images& images = job_.images;
    const std::int64_t size = job_.plane.size, first = tile * job_.tile_pixels * job_.lanes;
    for (; begin < end; begin += kStack) {
      const std::int64_t count = std::min(kStack, end - begin);
      const void* in = advance(images.images, begin * size, images.in_type);
      void* out = advance(images.out, begin * size + first, images.out_type);
      if (images.in_type == DType::u8) {
        sample_stack(static_cast<const std::uint8_t*>(in), out, begin % images.channels, count);
      } else {
        sample_stack(static_cast<const float*>(in), out, begin % images.channels, count);
      }
    }
  }

 private:
  float* row(int tap) { return weight_.data() + tap * capacity_; }

  template <class In>
  void sample_stack(const In* in, void* out, std::int64_t channel, std::int64_t count) {
    const bool per_element = job_.lanes > 1;
    Affine affine{nullptr, nullptr, per_element};
    if (!job_.scale.empty()) {
      const std::int64_t first = per_element ? 0 : channel * kBlock;
      affine = {job_.scale.data() + first, job_.shift.data() + first, per_element};
    }
    const std::int64_t size = job_.plane.size;
    const Stack<In> stack{in, size, out, size, count, job_.images.out_type, affine, job_.streamed};
    sample(stack, job_.plane, taps_, job_.windows ? windows_.data() : nullptr, places_.data(), sums_.data());
  }

  void set_taps(const std::int32_t* offset, const float* weight, std::int64_t stride, std::int64_t pixels) {
    const std::int64_t lanes = job_.lanes;
    taps_ = {offset, weight, stride, pixels * lanes};
    if (lanes > 1) {
      // In channels_last each channel has taps of its own, a pixel apart.
      for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
        const std::int32_t at = offset[pixel] * static_cast<std::int32_t>(lanes);
        for (std::int64_t lane = 0; lane < lanes; ++lane) {
          offset_[pixel * lanes + lane] = at + static_cast<std::int32_t>(lane);
        }
      }
      for (int tap = 0; tap < 4; ++tap) {
        for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
          std::fill_n(row(tap) + pixel * lanes, lanes, weight[tap * stride + pixel]);
        }
      }
      taps_ = {offset_.data(), row(0), capacity_, pixels * lanes};
    }
    if (job_.windows) {
      const std::int64_t columns = job_.images.in_type == DType::u8 ? kColumns<std::uint8_t> : kColumns<float>;
      find_windows(taps_, job_.plane, columns, windows_.data(), places_.data());
    }
  }

  const Job& job_;
  std::int64_t capacity_;
  std::vector<std::int32_t> offset_;
  std::vector<float> weight_;
  std::vector<Window> windows_;
  std::vector<std::uint8_t> places_;
  std::vector<float> sums_;
  std::vector<std::uint32_t> words_;
  Taps taps_{};
};

// body(images from, to, tiles from, to): the batch is cut by images, or, where there are too few, by tiles.
template <class Body>
void split(const Job& job, int threads, const Body& body) {
  const std::int64_t batch = job.images.batch;
  const std::int64_t per_image = job.pixels * job.images.channels;
  if (batch >= threads) {
    parallel_for(batch, std::max<std::int64_t>(kGrain / std::max<std::int64_t>(per_image, 1), 1), threads,
                 [&](std::int64_t begin, std::int64_t end) { body(begin, end, 0, job.tiles); });
  } else {
    const std::int64_t per_tile = job.tile_pixels * job.images.channels * batch;
    parallel_for(job.tiles, std::max<std::int64_t>(kGrain / std::max<std::int64_t>(per_tile, 1), 1), threads,
                 [&](std::int64_t begin, std::int64_t end) { body(0, batch, begin, end); });
  }
}

}  // namespace

bool run(const Images& images, const std::int32_t* offsets, const float* weights, int threads) {
  if (images.batch * images.channels == 0) return true;
  const std::int64_t pixels = images.height * images.width;
  const std::int64_t last = pixels - 1 - (images.width > 1 ? 1 : 0) - (images.height > 1 ? images.width : 0);
  if (!all_within(offsets, pixels, static_cast<std::int32_t>(last))) return false;
  const Job job(images);
  const std::int64_t bytes =
      std::min(job.tile_pixels, pixels) * images.channels * (size_of(images.in_type) + size_of(images.out_type));
  const std::int64_t group = std::max<std::int64_t>(kGroupBytes / std::max<std::int64_t>(bytes, 1), 1);
  split(job, threads, [&](std::int64_t begin, std::int64_t end, std::int64_t tile_begin, std::int64_t tile_end) {
    Worker worker(job);
    for (; begin < end; begin += group) {
      for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
        worker.load_shared(tile, offsets, weights);
        worker.run(begin * job.planes, std::min(begin + group, end) * job.planes, tile);
      }
    }
  });
  return true;
}

void run_noise(const Images& images, const float* grid, float amplitude, const std::int64_t* image_ids,
               std::uint64_t seed, int threads) {
  if (images.batch * images.channels == 0) return;
  const Job job(images);
  split(job, threads, [&](std::int64_t begin, std::int64_t end, std::int64_t tile_begin, std::int64_t tile_end) {
    Worker worker(job);
    for (std::int64_t image = begin; image < end; ++image) {
      for (std::int64_t tile = tile_begin; tile < tile_end; ++tile) {
        worker.load_noisy(tile, grid, amplitude, image_ids[image], seed);
        worker.run(image * job.planes, (image + 1) * job.planes, tile);
      }
    }
  });
}

}  // namespace pbe::warp
