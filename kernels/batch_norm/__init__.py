"""Batch normalisation in training, and the ReLU after it: ``torch.ops.pbe_fast.batch_norm``, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.batch_norm import reference

Three = tuple[Tensor, Tensor, Tensor]

_OPTIONS = "Tensor? weight, Tensor? bias"
backends.LIB.define(f"batch_norm(Tensor x, {_OPTIONS}, float eps, bool relu) -> (Tensor, Tensor, Tensor)")
backends.LIB.define(
    f"batch_norm_backward(Tensor grad, Tensor? beside, Tensor x, {_OPTIONS}, Tensor mean, Tensor variance, "
    "float eps, bool relu) -> (Tensor, Tensor, Tensor)"
)


class Norm(NamedTuple):
    """What both operations work on."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool


class Version(NamedTuple):
    """One version of the two operations, for checked tensors."""

    forward: Callable[[Norm], Three]
    # Of a gradient and the one beside it, and the mean and variance of the forward pass.
    backward: Callable[[Tensor, Tensor | None, Norm, Tensor, Tensor], Three]


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = False,
    backend: str | None = None,
) -> Three:
    """``weight (x - mean) / sqrt(variance + eps) + bias`` per channel, with the statistics of the batch, then ReLU.

    Args:
        x: float32 or bfloat16 (B, C, H, W), at least two values per channel; channels_last is read as it is.
        weight: float32 (C,), or None for ones.
        bias: float32 (C,), or None for zeros.
        eps: Added to the variance.
        relu: Whether negative results become zero.
        backend: "reference" or "native" by name; None lets the dispatcher choose by device.

    Returns:
        The result, in the dtype of ``x``, channels_last, rounded once; mean and biased variance (C,), float32.
        Gradients flow from the result to ``x``, ``weight`` and ``bias``; none from the statistics.

    Raises:
        ValueError: Shapes or devices that do not fit together, or a backend for another device.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.
    """
    if backend is None:
        out: Three = torch.ops.pbe_fast.batch_norm.default(x, weight, bias, eps, relu)
        return out
    backends.require("batch_norm", backend, x)
    return _forward(_REFERENCE if backend == "reference" else _NATIVE)(x, weight, bias, eps, relu)


def batch_norm_and(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`batch_norm`, and ``x`` itself for its one other reader, whose gradient is added in the same pass.

    Raises:
        ValueError, TypeError: As `batch_norm`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y, mean, variance, same = backends.applied(_GradientAnd, x, weight, bias, eps, relu)
        return y, mean, variance, same
    return *batch_norm(x, weight, bias, eps=eps, relu=relu), x


def is_fast() -> bool:
    """Whether the native version runs here: it was built, and the processor has AVX512-BF16."""
    return backends.missing("batch_norm", "native") is None


def _check(x: Tensor, **channels: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x; got shape {tuple(x.shape)}; accepted: (B, C, H, W)")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x; got {x.dtype}; accepted: float32, bfloat16")
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"x; got shape {tuple(x.shape)}; accepted: two values per channel or more")
    for name, values in channels.items():
        if values is None:
            continue
        if values.dtype != torch.float32 or values.shape != x.shape[1:2] or values.device != x.device:
            got = f"{values.dtype} {tuple(values.shape)} on {values.device}"
            raise ValueError(f"{name}; got {got}; accepted: float32 ({x.shape[1]},) on {x.device}")


def _native_forward(norm: Norm) -> Three:
    y, mean, variance = out = _nothing(norm)
    norm = _laid_out(norm)
    backends.native_op("batch_norm").run(
        *_job(norm), y.data_ptr(), mean.data_ptr(), variance.data_ptr(), torch.get_num_threads()
    )
    return out


def _native_backward(grad: Tensor, beside: Tensor | None, norm: Norm, mean: Tensor, variance: Tensor) -> Three:
    grad_x, grad_weight, grad_bias = out = _nothing(norm)
    norm, grad, mean, variance = _laid_out(norm), backends.channels_last(grad), mean.contiguous(), variance.contiguous()
    beside = None if beside is None else backends.channels_last(beside)
    backends.native_op("batch_norm").backward(
        *_job(norm),
        grad.data_ptr(),
        backends.address(beside),
        mean.data_ptr(),
        variance.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _laid_out(norm: Norm) -> Norm:
    """As the native version reads it: channels side by side, weight and bias dense."""
    return norm._replace(x=backends.channels_last(norm.x), weight=_dense(norm.weight), bias=_dense(norm.bias))


def _job(norm: Norm) -> tuple[Any, ...]:
    batch, channels, height, width = norm.x.shape
    addresses = [backends.address(values) for values in (norm.weight, norm.bias)]
    code = backends.DTYPE_CODE[norm.x.dtype]
    return norm.x.data_ptr(), *addresses, code, batch * height * width, channels, norm.eps, norm.relu


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _nothing(norm: Norm) -> Three:
    x = norm.x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, _channels(x), _channels(x)


def _channels(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def _reference_forward(norm: Norm) -> Three:
    y, mean, variance = reference.batch_norm(*norm)
    return y.contiguous(memory_format=torch.channels_last), mean, variance


def _reference_backward(grad: Tensor, beside: Tensor | None, norm: Norm, mean: Tensor, variance: Tensor) -> Three:
    x, weight, bias, eps, relu = norm
    grad_x, grad_weight, grad_bias = reference.batch_norm_backward(
        grad, beside, x, weight, bias, mean, variance, eps, relu
    )
    return grad_x.contiguous(memory_format=torch.channels_last), grad_weight, grad_bias


def _forward(version: Version) -> Callable[..., Three]:
    def call(*arguments: Any) -> Three:
        norm = Norm(*arguments)
        _check(norm.x, weight=norm.weight, bias=norm.bias)
        return version.forward(norm)

    return call


def _backward(version: Version) -> Callable[..., Three]:
    def call(grad: Tensor, beside: Tensor | None, *arguments: Any) -> Three:
        x, weight, bias, mean, variance, eps, relu = arguments
        _check(x, weight=weight, bias=bias, mean=mean, variance=variance)
        for name, other in (("grad", grad), ("beside", beside)):
            if other is None:
                continue
            if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
                got = f"{other.dtype} {tuple(other.shape)} on {other.device}"
                raise ValueError(f"{name}; got {got}; accepted: as x, {x.dtype} {tuple(x.shape)} on {x.device}")
        return version.backward(grad, beside, Norm(x, weight, bias, eps, relu), mean, variance)

    return call


_REFERENCE = Version(_reference_forward, _reference_backward)
_NATIVE = Version(_native_forward, _native_backward)
_NOTHING = Version(_nothing, lambda grad, beside, norm, *_: _nothing(norm))
_cpu = _NATIVE if is_fast() else _REFERENCE

for _name, _form in (("batch_norm", _forward), ("batch_norm_backward", _backward)):
    backends.implement(_name, reference=_form(_REFERENCE), cpu=_form(_cpu), fake=_form(_NOTHING))


_op = torch.ops.pbe_fast.batch_norm.default


class _Gradient(torch.autograd.Function):
    """The gradients of `batch_norm`; see those of conv3x3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, variance = _op(x, weight, bias, eps, relu)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps, ctx.relu = eps, relu
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        # Of the mean, the variance, and what `batch_norm_and` passes on.
        beside = others[2] if len(others) == 3 else None
        x, weight, bias, mean, variance = ctx.saved_tensors
        backward = torch.ops.pbe_fast.batch_norm_backward.default
        grads = backward(grad, beside, x, weight, bias, mean, variance, ctx.eps, ctx.relu)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


class _GradientAnd(_Gradient):
    """Those of `batch_norm_and`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> Any:
        return *_Gradient.forward(ctx, x, weight, bias, eps, relu), x


def _with_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> Three:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        out: Three = _Gradient.apply(x, weight, bias, eps, relu)  # type: ignore[no-untyped-call]
        return out
    with torch._C._AutoDispatchBelowAutograd():
        out = _op(x, weight, bias, eps, relu)
    return out


backends.LIB.impl("batch_norm", _with_gradient, "Autograd")
