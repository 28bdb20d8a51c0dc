// pbe_fast._native: the only file that knows nanobind. Tensors arrive as addresses (data_ptr()), which costs a tenth of
// an ndarray argument; the checks on shapes, types and layouts are in the operations' __init__.py.
#include <nanobind/nanobind.h>

#include "pgd_step/native.h"

namespace nb = nanobind;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// One function per operation: a submodule of the same name. Its presence is how backends.py knows the native build.

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

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The C++ versions of the operations in pbe_fast.kernels.";
  bind_pgd_step(m.def_submodule("pgd_step"));
}
