"""One PGD step with the model's next input: ``torch.ops.pbe_fast.pgd_step`` and its in-place form ``pgd_step_``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.pgd_step import reference

NORMS = ("linf", "l2")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

backends.LIB.define(
    "pgd_step(Tensor adv, Tensor grad, Tensor origin, float eps, float alpha, str norm, Tensor? mean, Tensor? std, "
    "ScalarType out_dtype) -> (Tensor, Tensor)"
)
backends.LIB.define(
    "pgd_step_(Tensor(a!) adv, Tensor grad, Tensor origin, Tensor(b!)? model_input, float eps, float alpha, str norm, "
    "Tensor? mean, Tensor? std) -> ()"
)


class Step(NamedTuple):
    """What every version works on: checked tensors, dense and in one layout; ``adv_next`` may be ``adv``."""

    adv: Tensor
    grad: Tensor
    origin: Tensor
    adv_next: Tensor
    model_input: Tensor | None
    eps: float
    alpha: float
    norm: str
    mean: Tensor | None
    std: Tensor | None
    layout: torch.memory_format


Run = Callable[[Step], None]


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    origin: Tensor,
    *,
    eps: float,
    alpha: float,
    norm: str = "linf",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One PGD step: along the gradient, back onto the eps ball around the origin, back into [0, 1].

    Args:
        adv: The adversarial images so far, float32 (B, C, H, W) in [0, 1], contiguous or channels_last.
        grad: Gradient of the loss with respect to the model input that belongs to ``adv``: the normalised one where
            ``mean`` and ``std`` are given, else the pixels. float32, float16 or bfloat16, any layout.
        origin: The clean images; shape, dtype and layout of ``adv``.
        eps: Radius of the ball, in pixel units of [0, 1].
        alpha: Length of the step, in the same units.
        norm: "linf" steps by alpha * sign(grad), "l2" by alpha * grad / |grad|, |grad| per image.
        mean: Normalisation per channel, float32 (C,), on the device of ``adv``; given together with ``std``.
        std: As ``mean``; positive.
        out_dtype: Of the model input: float32, float16 or bfloat16.
        backend: "reference", "native" or "triton" by name; None lets the dispatcher choose by device.

    Returns:
        The next adversarial images, float32, and the model input ``(adv_next - mean) / std`` in ``out_dtype`` (without
        ``mean``: a cast copy), both in the layout of ``adv``. Neither carries a gradient.

    Raises:
        ValueError: Shapes, layouts, devices or options that do not fit together.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.

    A NaN in ``grad`` gives its element no step under "linf" and its image no step under "l2"; README.md has the rest.
    """
    with _without_gradients(adv, grad, origin, mean, std):
        if backend is None:
            return torch.ops.pbe_fast.pgd_step.default(  # type: ignore[no-any-return]
                adv, grad, origin, eps, alpha, norm, mean, std, out_dtype
            )
        return _functional(_named(backend, adv))(adv, grad, origin, eps, alpha, norm, mean, std, out_dtype)


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    origin: Tensor,
    model_input: Tensor | None = None,
    *,
    eps: float,
    alpha: float,
    norm: str = "linf",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """`pgd_step` without new tensors: overwrites ``adv``, and ``model_input`` where one is given.

    Args:
        adv: As in `pgd_step`; holds the next adversarial images afterwards.
        grad: As in `pgd_step`; in another layout than ``adv`` it is copied first.
        origin: As in `pgd_step`.
        model_input: Receives the model input in its own dtype; shape and layout of ``adv``, memory of its own.
        eps: As in `pgd_step`.
        alpha: As in `pgd_step`.
        norm: As in `pgd_step`.
        mean: As in `pgd_step`.
        std: As in `pgd_step`.
        backend: As in `pgd_step`.

    Raises:
        ValueError: As in `pgd_step`.
        TypeError: As in `pgd_step`.
        RuntimeError: As in `pgd_step`.
    """
    with _without_gradients(adv, grad, origin, model_input, mean, std):
        if backend is None:
            torch.ops.pbe_fast.pgd_step_.default(adv, grad, origin, model_input, eps, alpha, norm, mean, std)
        else:
            _inplace(_named(backend, adv))(adv, grad, origin, model_input, eps, alpha, norm, mean, std)


def _without_gradients(*tensors: Tensor | None) -> AbstractContextManager[object]:
    # Entering no_grad takes longer than a step on one image does, and mostly there is nothing to keep out.
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.no_grad()
    return nullcontext()


def _layout(tensor: Tensor) -> torch.memory_format | None:
    if tensor.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if tensor.is_contiguous(memory_format=torch.channels_last) else None


def _has_layout(tensor: Tensor, layout: torch.memory_format) -> bool:
    # The short form of the call is the faster one.
    return tensor.is_contiguous() if layout is torch.contiguous_format else tensor.is_contiguous(memory_format=layout)


def _check(
    adv: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    alpha: float,
    norm: str,
    mean: Tensor | None,
    std: Tensor | None,
    out_dtype: torch.dtype,
) -> torch.memory_format:
    shape, device = adv.shape, adv.device  # each look at a tensor takes a tenth of a microsecond
    if len(shape) != 4:
        raise ValueError(f"adv; got shape {tuple(shape)}; accepted: (B, C, H, W)")
    if adv.dtype != torch.float32 or origin.dtype != torch.float32:
        raise TypeError(f"adv and origin; got {adv.dtype} and {origin.dtype}; accepted: float32")
    if grad.dtype not in DTYPES or out_dtype not in DTYPES:
        raise TypeError(f"grad and model input; got {grad.dtype} and {out_dtype}; accepted: {DTYPES}")
    if grad.shape != shape or origin.shape != shape:
        got = f"grad {tuple(grad.shape)}, origin {tuple(origin.shape)}"
        raise ValueError(f"shapes; got {got}; accepted: that of adv, {tuple(shape)}")
    layout = _layout(adv)
    if layout is None or not _has_layout(origin, layout):
        got = f"strides {adv.stride()} and {origin.stride()}"
        raise ValueError(f"layout of adv and origin; got {got}; accepted: both contiguous or both channels_last")
    if norm not in NORMS:
        raise ValueError(f"norm; got {norm!r}; accepted: {NORMS}")
    if not (0 <= eps < math.inf and 0 <= alpha < math.inf):
        raise ValueError(f"eps and alpha; got {eps} and {alpha}; accepted: finite and not negative")
    if (mean is None) != (std is None):
        raise ValueError("mean and std; got one of them; accepted: both or neither")
    others = [grad.device, origin.device]
    if mean is not None and std is not None:
        others += mean.device, std.device
        for name, value in (("mean", mean), ("std", std)):
            if value.dtype != torch.float32 or value.shape != shape[1:2] or not value.is_contiguous():
                got = f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"{name}; got {got}; accepted: contiguous float32 ({shape[1]},)")
    for other in others:
        if other != device:
            got = ", ".join(sorted(map(str, others)))
            raise ValueError(f"devices; got {got}; accepted: that of adv, {device}")
    return layout


def _check_model_input(adv: Tensor, model_input: Tensor, layout: torch.memory_format) -> None:
    fits = model_input.shape == adv.shape and _has_layout(model_input, layout)
    if not fits or model_input.device != adv.device:
        got = f"{tuple(model_input.shape)}, strides {model_input.stride()}, on {model_input.device}"
        raise ValueError(f"model_input; got {got}; accepted: shape, layout and device of adv")
    if model_input is adv:
        raise ValueError("model_input; got adv; accepted: memory of its own")


def _run_reference(step: Step) -> None:
    out_dtype = torch.float32 if step.model_input is None else step.model_input.dtype
    adv_next, model_input = reference.pgd_step(
        step.adv, step.grad, step.origin, step.eps, step.alpha, step.norm, step.mean, step.std, out_dtype
    )
    step.adv_next.copy_(adv_next)
    if step.model_input is not None:
        step.model_input.copy_(model_input)


def _run_native(step: Step) -> None:
    images, channels, height, width = step.adv.shape
    backends.native_op("pgd_step").run(
        step.adv.data_ptr(),
        step.grad.data_ptr(),
        step.origin.data_ptr(),
        step.adv_next.data_ptr(),
        backends.address(step.model_input),
        backends.DTYPE_CODE[step.grad.dtype],
        0 if step.model_input is None else backends.DTYPE_CODE[step.model_input.dtype],
        images,
        channels,
        height * width,
        step.layout == torch.channels_last,
        backends.address(step.mean),
        backends.address(step.std),
        step.eps,
        step.alpha,
        NORMS.index(step.norm),
        torch.get_num_threads(),
    )


def _run_triton(step: Step) -> None:
    from pbe_fast.kernels.pgd_step import triton_kernel  # not before a GPU tensor comes along

    triton_kernel.run(
        step.adv,
        step.grad,
        step.origin,
        step.adv_next,
        step.model_input,
        step.eps,
        step.alpha,
        step.norm,
        step.mean,
        step.std,
        channels_last=step.layout == torch.channels_last,
    )


def _functional(run: Run) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(
        adv: Tensor,
        grad: Tensor,
        origin: Tensor,
        eps: float,
        alpha: float,
        norm: str,
        mean: Tensor | None,
        std: Tensor | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        layout = _check(adv, grad, origin, eps, alpha, norm, mean, std, out_dtype)
        adv_next, model_input = torch.empty_like(adv), torch.empty_like(adv, dtype=out_dtype)
        grad = grad if _has_layout(grad, layout) else grad.contiguous(memory_format=layout)
        run(Step(adv, grad, origin, adv_next, model_input, eps, alpha, norm, mean, std, layout))
        return adv_next, model_input

    return call


def _inplace(run: Run) -> Callable[..., None]:
    def call(
        adv: Tensor,
        grad: Tensor,
        origin: Tensor,
        model_input: Tensor | None,
        eps: float,
        alpha: float,
        norm: str,
        mean: Tensor | None,
        std: Tensor | None,
    ) -> None:
        out_dtype = torch.float32 if model_input is None else model_input.dtype
        layout = _check(adv, grad, origin, eps, alpha, norm, mean, std, out_dtype)
        if model_input is not None:
            _check_model_input(adv, model_input, layout)
        grad = grad if _has_layout(grad, layout) else grad.contiguous(memory_format=layout)
        run(Step(adv, grad, origin, adv, model_input, eps, alpha, norm, mean, std, layout))
        # Autograd must hear of it: a backward pass that still needs the old values would take the new ones.
        torch.autograd.graph.increment_version([adv] if model_input is None else [adv, model_input])

    return call


def _run_nothing(step: Step) -> None:
    """What a fake tensor gets: the checks, and outputs of the right shape."""


@functools.cache
def _cuda() -> Run:
    return _run_triton if backends.triton_installed() else _run_reference


_RUNS: dict[str, Run] = {"reference": _run_reference, "native": _run_native, "triton": _run_triton}
_cpu = _run_native if backends.native_op("pgd_step") is not None else _run_reference

for _name, _form in (("pgd_step", _functional), ("pgd_step_", _inplace)):
    backends.LIB.impl(_name, _form(_run_reference), "CompositeExplicitAutograd")
    backends.LIB.impl(_name, _form(_cpu), "CPU")
    backends.LIB.impl(_name, _form(lambda step: _cuda()(step)), "CUDA")
    torch.library.register_fake(f"pbe_fast::{_name}", _form(_run_nothing), lib=backends.LIB)


def _named(backend: str, adv: Tensor) -> Run:
    backends.require("pgd_step", backend, adv)
    return _RUNS[backend]
