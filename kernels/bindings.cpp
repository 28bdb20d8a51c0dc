// pbe_fast._native: the only file that knows nanobind. Tensors arrive as addresses (data_ptr()), which costs a tenth of
// an ndarray argument; the checks on shapes, types and layouts are in the operations' __init__.py.
#include <nanobind/nanobind.h>

#include "affine_relu/native.h"
#include "batch_norm/native.h"
#include "conv3x3/native.h"
#include "conv_grad/native.h"
#include "cosine_rank/native.h"
#include "levels.h"
#include "pgd_step/native.h"
#include "warp/native.h"

namespace nb = nanobind;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One function per operation: a submodule of the same name. Its presence is how backends.py knows the native build.

void bind_affine_relu(nb::module_ module) {
  namespace op = pbe::affine_relu;
  using Halves = const std::uint16_t;
  module.def("is_supported", [] { return op::is_supported(); });
  module.def("run", [](Address x, Address scale, Address shift, Address out, std::int64_t pixels, std::int64_t channels,
                       int threads) {
    const nb::gil_scoped_release nogil;
    op::run({pbe::DType::bf16, pixels, channels, true}, at<const void>(x), at<const float>(scale),
            at<const float>(shift), at<void>(out), threads);
  });
  module.def("backward", [](Address grad, Address y, Address scale, Address beside, Address out, std::int64_t pixels,
                            std::int64_t channels, int threads) {
    const nb::gil_scoped_release nogil;
    op::backward({at<Halves>(grad), at<Halves>(y), at<Halves>(beside), at<const float>(scale), at<std::uint16_t>(out)},
                 pixels, channels, threads);
  });
}

pbe::batch_norm::Job batch_norm_job(Address x, Address weight, Address bias, int type, std::int64_t pixels,
                                    std::int64_t channels, double eps, bool relu) {
  return {static_cast<pbe::DType>(type), pixels, channels, at<const void>(x), at<const float>(weight),
          at<const float>(bias),         eps,    relu};
}

void bind_batch_norm(nb::module_ module) {
  namespace op = pbe::batch_norm;
  module.def("is_supported", [] { return op::is_supported(); });
  module.def("run", [](Address x, Address weight, Address bias, int type, std::int64_t pixels, std::int64_t channels,
                       double eps, bool relu, Address y, Address mean, Address variance, int threads) {
    const op::Job job = batch_norm_job(x, weight, bias, type, pixels, channels, eps, relu);
    const nb::gil_scoped_release nogil;
    op::forward(job, at<void>(y), at<float>(mean), at<float>(variance), threads);
  });
  module.def("backward", [](Address x, Address weight, Address bias, int type, std::int64_t pixels,
                            std::int64_t channels, double eps, bool relu, Address grad, Address beside, Address mean,
                            Address variance, Address grad_x, Address grad_weight, Address grad_bias, int threads) {
    const op::Job job = batch_norm_job(x, weight, bias, type, pixels, channels, eps, relu);
    const nb::gil_scoped_release nogil;
    op::backward(job, at<const void>(grad), at<const void>(beside), at<const float>(mean), at<const float>(variance),
                 at<void>(grad_x), at<float>(grad_weight), at<float>(grad_bias), threads);
  });
}

void bind_conv_grad(nb::module_ module) {
  namespace op = pbe::conv_grad;
  using Halves = const std::uint16_t;
  using Size = std::int64_t;
  module.def("is_supported", [] { return op::is_supported(); });
  module.def("run", [](Address grad, Address mask, Address grad_beside, Address packed, Address grad_images,
                       Size images, Size height, Size width, Size channels_in, Size height_out, Size width_out,
                       Size channels, Size channels_beside, Size kernel, Size stride, Size padding, int threads) {
    const op::Job job{at<Halves>(grad),
                      at<Halves>(mask),
                      at<Halves>(grad_beside),
                      at<Halves>(packed),
                      at<std::uint16_t>(grad_images),
                      images,
                      height,
                      width,
                      channels_in,
                      height_out,
                      width_out,
                      channels,
                      channels_beside,
                      kernel,
                      stride,
                      padding};
    const nb::gil_scoped_release nogil;
    op::run(job, threads);
  });
}

void bind_conv3x3(nb::module_ module) {
  namespace op = pbe::conv3x3;
  module.def("is_supported", [] { return op::is_supported(); });
  module.def("run", [](Address x, Address mask, Address packed, Address bias, Address residual, Address y,
                       std::int64_t images, std::int64_t height, std::int64_t width, std::int64_t channels_in,
                       std::int64_t channels_out, bool relu, int threads) {
    using Halves = const std::uint16_t;
    const op::Job job{at<Halves>(x),
                      at<Halves>(mask),
                      at<Halves>(packed),
                      at<const float>(bias),
                      at<Halves>(residual),
                      at<std::uint16_t>(y),
                      images,
                      height,
                      width,
                      channels_in,
                      channels_out,
                      relu};
    const nb::gil_scoped_release nogil;
    op::run(job, threads);
  });
  module.def("pack", [](Address weight, std::int64_t channels_out, std::int64_t channels_in,
                        std::int64_t channel_stride, std::int64_t tap_stride, bool rotated, Address packed,
                        int threads) {
    const op::Filters filters{at<const float>(weight), channels_out, channels_in, channel_stride, tap_stride, rotated};
    const nb::gil_scoped_release nogil;
    op::pack(filters, at<std::uint16_t>(packed), threads);
  });
}

void bind_cosine_rank(nb::module_ module) {
  namespace op = pbe::cosine_rank;
  module.def("distance", [](Address a, Address b, int type_a, int type_b, std::int64_t stride_a, std::int64_t stride_b,
                            std::int64_t rows, std::int64_t classes, Address out, int threads) {
    const op::Logits logits_a{at<const void>(a), static_cast<pbe::DType>(type_a), stride_a};
    const op::Logits logits_b{at<const void>(b), static_cast<pbe::DType>(type_b), stride_b};
    const nb::gil_scoped_release nogil;
    op::distance(logits_a, logits_b, rows, classes, at<float>(out), threads);
  });
  module.def("select_smallest", [](Address values, std::int64_t count, std::int64_t n, Address out, int threads) {
    const nb::gil_scoped_release nogil;
    op::select_smallest(at<const float>(values), count, n, at<std::int64_t>(out), threads);
  });
}

void bind_pgd_step(nb::module_ module) {
  namespace op = pbe::pgd_step;
  module.def("run", [](Address adv, Address grad, Address origin, Address adv_next, Address model_input, int grad_type,
                       int input_type, std::int64_t images, std::int64_t channels, std::int64_t pixels,
                       bool channels_last, Address mean, Address std, float eps, float alpha, int norm, int threads) {
    const op::Step step{at<const float>(adv),
                        at<const float>(origin),
                        at<float>(adv_next),
                        at<const void>(grad),
                        at<void>(model_input),
                        static_cast<pbe::DType>(grad_type),
                        static_cast<pbe::DType>(input_type),
                        images,
                        channels,
                        pixels,
                        channels_last,
                        at<const float>(mean),
                        at<const float>(std),
                        eps,
                        alpha,
                        static_cast<op::Norm>(norm)};
    const nb::gil_scoped_release nogil;
    op::run(step, threads);
  });
}

pbe::warp::Images warp_images(Address images, Address out, int in_type, int out_type, std::int64_t batch,
                              std::int64_t channels, std::int64_t height, std::int64_t width, bool channels_last,
                              Address mean, Address std) {
  return {at<const void>(images),
          at<void>(out),
          static_cast<pbe::DType>(in_type),
          static_cast<pbe::DType>(out_type),
          batch,
          channels,
          height,
          width,
          channels_last,
          at<const float>(mean),
          at<const float>(std)};
}

void bind_warp(nb::module_ module) {
  namespace op = pbe::warp;
  module.def("run", [](Address images, Address out, int in_type, int out_type, std::int64_t batch,
                       std::int64_t channels, std::int64_t height, std::int64_t width, bool channels_last, Address mean,
                       Address std, int threads, Address offsets, Address weights) {
    const op::Images job =
        warp_images(images, out, in_type, out_type, batch, channels, height, width, channels_last, mean, std);
    bool inside;
    {
      const nb::gil_scoped_release nogil;
      inside = op::run(job, at<const std::int32_t>(offsets), at<const float>(weights), threads);
    }
    if (!inside) throw nb::value_error("offsets; got some outside of the plane; accepted: as from WarpPlan.of");
  });
  module.def(
      "run_noise", [](Address images, Address out, int in_type, int out_type, std::int64_t batch, std::int64_t channels,
                      std::int64_t height, std::int64_t width, bool channels_last, Address mean, Address std,
                      int threads, Address grid, float amplitude, Address image_ids, std::uint64_t seed) {
        const op::Images job =
            warp_images(images, out, in_type, out_type, batch, channels, height, width, channels_last, mean, std);
        const nb::gil_scoped_release nogil;
        op::run_noise(job, at<const float>(grid), amplitude, at<const std::int64_t>(image_ids), seed, threads);
      });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The C++ versions of the operations in pbe_fast.kernels.";
  m.def("limit_level", [](int most) { return static_cast<int>(pbe::limit_level(static_cast<pbe::Level>(most))); });
  bind_affine_relu(m.def_submodule("affine_relu"));
  bind_batch_norm(m.def_submodule("batch_norm"));
  bind_conv_grad(m.def_submodule("conv_grad"));
  bind_conv3x3(m.def_submodule("conv3x3"));
  bind_cosine_rank(m.def_submodule("cosine_rank"));
  bind_pgd_step(m.def_submodule("pgd_step"));
  bind_warp(m.def_submodule("warp"));
}
