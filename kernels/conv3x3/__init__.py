"""A 3 x 3 convolution by Winograd's F(2 x 2, 3 x 3): ``torch.ops.pbe_fast.conv3x3``, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.conv3x3.versions import (
    NATIVE,
    NOTHING,
    REFERENCE,
    Conv,
    Version,
    check,
    check_weight,
)

backends.LIB.define("conv3x3_pack(Tensor weight, bool transposed) -> Tensor")
backends.LIB.define(
    "conv3x3(Tensor x, Tensor? mask, Tensor packed, Tensor packed_transposed, Tensor? bias, Tensor? residual, "
    "bool relu, int channels_out) -> Tensor"
)


class Packed(NamedTuple):
    """The filters of one convolution, transformed: what `conv3x3` computes with.

    Attributes:
        forward: For the outputs; see `reference.pack`.
        backward: For the gradients of the inputs.
        channels_out: K.
    """

    forward: Tensor
    backward: Tensor
    channels_out: int


def pack(weight: Tensor, *, backend: str | None = None) -> Packed:
    """The filters as `conv3x3` takes them, in both directions.

    Args:
        weight: (K, C, 3, 3) floating point. It gets no gradient.
        backend: "reference" or "native" by name; None lets the dispatcher choose by device.

    Returns:
        Filters in bfloat16, rounded once, from float32.

    Raises:
        ValueError: Another shape, or a backend for another device.
        RuntimeError: ``backend`` is not available here.
    """
    run = torch.ops.pbe_fast.conv3x3_pack.default if backend is None else _pack(_named(backend, weight))
    weight = weight.detach()
    return Packed(run(weight, False), run(weight, True), weight.shape[0])


def conv3x3(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` of bfloat16 images, with 4/9 of its multiplications.

    Args:
        x: bfloat16 (B, C, H, W), any layout; channels_last is read as it is.
        packed: From `pack`.
        bias: float32 (K,). It gets no gradient.
        residual: bfloat16 (B, K, H, W), added to the result.
        relu: Whether negative results become zero, after the addition.
        mask: bfloat16 (B, C, H, W): where it is not above zero, x counts as zero. It gets no gradient.
        backend: As for `pack`.

    Returns:
        bfloat16 (B, K, H, W), channels_last. Gradients flow to ``x`` and ``residual``, by the same algorithm.

    Raises:
        ValueError: Shapes or devices that do not fit together, or a backend for another device.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.
    """
    run = torch.ops.pbe_fast.conv3x3.default if backend is None else _conv(_named(backend, x))
    out: Tensor = run(x, mask, packed.forward, packed.backward, bias, residual, relu, packed.channels_out)
    return out


def conv3x3_and(x: Tensor, packed: Packed, bias: Tensor | None = None, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """`conv3x3`, and ``x`` itself for its one other reader, whose gradient is added in the same pass.

    Raises:
        ValueError, TypeError: As `conv3x3`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        forward, backward, channels_out = packed
        arguments = (x, None, forward, backward, bias, None, relu, channels_out)
        out, same = backends.applied(_GradientAnd, *arguments)
        return out, same
    return conv3x3(x, packed, bias, relu=relu), x


def is_fast() -> bool:
    """Whether the native version runs here: it was built, and the processor has AVX512-BF16."""
    return backends.missing("conv3x3", "native") is None


def _pack(version: Version) -> Callable[[Tensor, bool], Tensor]:
    def call(weight: Tensor, transposed: bool) -> Tensor:
        check_weight(weight)
        return version.pack(weight, transposed)

    return call


def _conv(version: Version) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        job = Conv(*arguments)
        check(job)
        return version.conv(job)

    return call


_cpu = NATIVE if is_fast() else REFERENCE

for _name, _form in (("conv3x3_pack", _pack), ("conv3x3", _conv)):
    backends.implement(_name, reference=_form(REFERENCE), cpu=_form(_cpu), fake=_form(NOTHING))

_op = torch.ops.pbe_fast.conv3x3.default


class _Gradient(torch.autograd.Function):
    """The gradients of `conv3x3`; with `torch.library.register_autograd` they take as long as a small convolution."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        job = Conv(*arguments)
        output = backends.below_autograd(_op, *arguments)
        ctx.save_for_backward(job.packed, job.packed_transposed, output if job.relu else None)
        ctx.channels_in = job.x.shape[1]
        ctx.has_residual = job.residual is not None
        ctx.has_mask = job.mask is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if ctx.has_mask:
            raise RuntimeError("gradient of conv3x3; got one with a mask, which is itself part of a gradient")
        packed, packed_transposed, output = ctx.saved_tensors
        if output is not None and ctx.has_residual:
            # Both take the same gradient, so it is written down.
            grad, output = torch.ops.aten.threshold_backward(grad, output, 0), None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _op(grad, output, packed_transposed, packed, None, beside, False, ctx.channels_in)
        return grad_x, None, None, None, None, grad if ctx.has_residual else None, None, None


class _GradientAnd(_Gradient):
    """Those of `conv3x3_and`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _Gradient.forward(ctx, *arguments), arguments[0]


def _with_gradient(*arguments: Any) -> Tensor:
    job = Conv(*arguments)
    if torch.is_grad_enabled() and (job.x.requires_grad or (job.residual is not None and job.residual.requires_grad)):
        return backends.applied(_Gradient, *arguments)
    return backends.below_autograd(_op, *arguments)


backends.LIB.impl("conv3x3", _with_gradient, "Autograd")


def _named(backend: str, tensor: Tensor) -> Version:
    backends.require("conv3x3", backend, tensor)
    return REFERENCE if backend == "reference" else NATIVE
