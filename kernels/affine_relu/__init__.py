"""A frozen batch normalisation and the ReLU after it, in one pass: ``torch.ops.pbe_fast.affine_relu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.affine_relu import reference

backends.LIB.define("affine_relu(Tensor x, Tensor scale, Tensor shift) -> Tensor")
backends.LIB.define("affine_relu_backward(Tensor grad, Tensor y, Tensor? scale, Tensor? beside) -> Tensor")

_Gradients = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class Version(NamedTuple):
    """One version of the two operations, for checked tensors."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: _Gradients


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor, *, backend: str | None = None) -> Tensor:
    """``relu(scale * x + shift)``, per channel.

    Args:
        x: bfloat16 (B, C, H, W), any layout; channels_last is read as it is.
        scale: float32 (C,). It gets no gradient.
        shift: float32 (C,). It gets no gradient.
        backend: "reference" or "native" by name; None lets the dispatcher choose by device.

    Returns:
        bfloat16 (B, C, H, W), channels_last, rounded once. Gradients flow to ``x``.

    Raises:
        ValueError: Shapes or devices that do not fit together, or a backend for another device.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.
    """
    if backend is None:
        out: Tensor = torch.ops.pbe_fast.affine_relu.default(x, scale, shift)
        return out
    backends.require("affine_relu", backend, x)
    return _forward(_REFERENCE if backend == "reference" else _NATIVE)(x, scale, shift)


def affine_relu_and(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`affine_relu`, and ``x`` itself for its one other reader, whose gradient is added in the same pass.

    Raises:
        ValueError, TypeError: As `affine_relu`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y, same = backends.applied(_GradientAnd, x, scale, shift)
        return y, same
    return affine_relu(x, scale, shift), x


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` where ``y`` is above zero.

    Args:
        grad: bfloat16 (B, C, H, W), any layout.
        y: As ``grad``: what a ReLU returned.

    Returns:
        bfloat16 (B, C, H, W), channels_last.

    Raises:
        ValueError: Shapes or devices that do not fit together.
        TypeError: A dtype that is not accepted.
    """
    out: Tensor = torch.ops.pbe_fast.affine_relu_backward.default(grad, y, None, None)
    return out


def _check(x: Tensor, **channels: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x; got shape {tuple(x.shape)}; accepted: (B, C, H, W)")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x; got {x.dtype}; accepted: bfloat16")
    for name, values in channels.items():
        if values.dtype != torch.float32 or values.shape != x.shape[1:2] or values.device != x.device:
            got = f"{values.dtype} {tuple(values.shape)} on {values.device}"
            raise ValueError(f"{name}; got {got}; accepted: float32 ({x.shape[1]},) on {x.device}")


def _native_forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out, rows = _empty(x), backends.channels_last(x)
    scale, shift = scale.contiguous(), shift.contiguous()
    backends.native_op("affine_relu").run(
        rows.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        *_pixels(rows),
        torch.get_num_threads(),
    )
    return out


def _native_backward(grad: Tensor, y: Tensor, scale: Tensor | None, beside: Tensor | None) -> Tensor:
    out, rows, outputs = _empty(grad), backends.channels_last(grad), backends.channels_last(y)
    other = None if beside is None else backends.channels_last(beside)
    scale = None if scale is None else scale.contiguous()
    backends.native_op("affine_relu").backward(
        rows.data_ptr(),
        outputs.data_ptr(),
        backends.address(scale),
        backends.address(other),
        out.data_ptr(),
        *_pixels(rows),
        torch.get_num_threads(),
    )
    return out


def _pixels(images: Tensor) -> tuple[int, int]:
    batch, channels, height, width = images.shape
    return batch * height * width, channels


def _empty(x: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward(version: Version) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        _check(x, scale=scale, shift=shift)
        return version.forward(x, scale, shift)

    return call


def _backward(version: Version) -> _Gradients:
    def call(grad: Tensor, y: Tensor, scale: Tensor | None, beside: Tensor | None) -> Tensor:
        _check(grad, **({} if scale is None else {"scale": scale}))
        backends.require_bf16("y", y, grad.shape, grad.device)
        if beside is not None:
            backends.require_bf16("beside", beside, grad.shape, grad.device)
        return version.backward(grad, y, scale, beside)

    return call


def _channels_last(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: run(*tensors).contiguous(memory_format=torch.channels_last)


_REFERENCE = Version(_channels_last(reference.affine_relu), _channels_last(reference.affine_relu_backward))
_NATIVE = Version(_native_forward, _native_backward)
_NOTHING = Version(_empty, _empty)
_cpu = _NATIVE if backends.missing("affine_relu", "native") is None else _REFERENCE

for _name, _form in (("affine_relu", _forward), ("affine_relu_backward", _backward)):
    backends.implement(_name, reference=_form(_REFERENCE), cpu=_form(_cpu), fake=_form(_NOTHING))


_op = torch.ops.pbe_fast.affine_relu.default


class _Gradient(torch.autograd.Function):
    """The gradient of `affine_relu`; see that of conv3x3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        output = backends.below_autograd(_op, x, scale, shift)
        ctx.save_for_backward(output, scale)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, beside: Tensor | None = None) -> tuple[Tensor, None, None]:
        output, scale = ctx.saved_tensors
        return torch.ops.pbe_fast.affine_relu_backward.default(grad, output, scale, beside), None, None


class _GradientAnd(_Gradient):
    """That of `affine_relu_and`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return _Gradient.forward(ctx, x, scale, shift), x


def _with_gradient(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return backends.applied(_Gradient, x, scale, shift)
    return backends.below_autograd(_op, x, scale, shift)


backends.LIB.impl("affine_relu", _with_gradient, "Autograd")
