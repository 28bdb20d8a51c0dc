"""A 3 x 3 convolution by Winograd's F(2 x 2, 3 x 3): ``torch.ops.pbe_fast.conv3x3``, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.conv3x3 import reference

GROUP = reference.GROUP

backends.LIB.define("conv3x3_pack(Tensor weight, bool transposed) -> Tensor")
backends.LIB.define("conv3x3_weight_gradient(Tensor x, Tensor grad) -> Tensor")
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


def weight_gradient(x: Tensor, grad: Tensor, *, backend: str | None = None) -> Tensor:
    """The gradient of the weight of a convolution without ``residual``, ``relu`` and ``mask``.

    Args:
        x: bfloat16 (B, C, H, W), what went in.
        grad: bfloat16 (B, K, H, W), the gradient of what came out.
        backend: As for `pack`.

    Returns:
        float32 (K, C, 3, 3), channels_last, summed in float32. It carries no gradient.

    Raises:
        ValueError: Shapes or devices that do not fit together, or a backend for another device.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.
    """
    run = torch.ops.pbe_fast.conv3x3_weight_gradient.default
    if backend is not None:
        run = _weight_gradient(_named(backend, x))
    out: Tensor = run(x, grad)
    return out


def is_fast() -> bool:
    """Whether the native version runs here: it was built, and the processor has AVX512-BF16."""
    return backends.missing("conv3x3", "native") is None


class Conv(NamedTuple):
    """What every version works on: checked tensors."""

    x: Tensor
    mask: Tensor | None
    packed: Tensor
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
    channels_out: int


class Version(NamedTuple):
    """One version of the three operations."""

    pack: Callable[[Tensor, bool], Tensor]
    conv: Callable[[Conv], Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]


def _packed_shape(channels_out: int, channels_in: int) -> tuple[int, ...]:
    groups_out, groups_in = -(-channels_out // GROUP), -(-channels_in // GROUP)
    return (groups_out, 16, groups_in * GROUP // 2, GROUP, 2)


def _check(job: Conv, packed_transposed: Tensor) -> None:
    x, shape, channels_out, device = job.x, job.x.shape, job.channels_out, job.x.device
    if len(shape) != 4:
        raise ValueError(f"x; got shape {tuple(shape)}; accepted: (B, C, H, W)")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x; got {x.dtype}; accepted: bfloat16")
    _check_filters("packed", job.packed, channels_out, shape[1], device)
    _check_filters("packed_transposed", packed_transposed, shape[1], channels_out, device)
    if job.mask is not None:
        _check_images("mask", job.mask, shape, device)
    if job.residual is not None:
        _check_images("residual", job.residual, torch.Size((shape[0], channels_out, *shape[2:])), device)
    bias = job.bias
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (channels_out,) or bias.device != device):
        got = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise ValueError(f"bias; got {got}; accepted: float32 ({channels_out},) on {device}")


def _check_filters(name: str, filters: Tensor, channels_out: int, channels_in: int, device: torch.device) -> None:
    shape = _packed_shape(channels_out, channels_in)
    fits = filters.dtype == torch.bfloat16 and filters.shape == shape and filters.is_contiguous()
    if not fits or filters.device != device:
        raise ValueError(
            f"{name}; got {filters.dtype} {tuple(filters.shape)} on {filters.device}; accepted: contiguous bfloat16 "
            f"{shape} on {device}, as from pack for {channels_in} channels in and {channels_out} out"
        )


def _check_images(name: str, images: Tensor, shape: torch.Size, device: torch.device) -> None:
    if images.dtype != torch.bfloat16:
        raise TypeError(f"{name}; got {images.dtype}; accepted: bfloat16")
    if images.shape != shape or images.device != device:
        got = f"{tuple(images.shape)} on {images.device}"
        raise ValueError(f"{name}; got {got}; accepted: {tuple(shape)} on {device}")


def _pack_native(weight: Tensor, transposed: bool) -> Tensor:
    channels_out, channels_in = weight.shape[:2]
    # (K, 3, 3, C): what channels_last has.
    rows = weight.to(torch.float32).permute(0, 2, 3, 1).contiguous()
    if transposed:
        sizes = (channels_in, channels_out)
        strides = (9 * channels_in, channels_in)
    else:
        rows = rows.view(channels_out, -1).t().contiguous()
        sizes = (channels_out, channels_in)
        strides = (channels_out, channels_in * channels_out)
    packed = torch.empty(_packed_shape(*sizes), dtype=torch.bfloat16)
    backends.native_op("conv3x3").pack(
        rows.data_ptr(), *sizes, *strides, transposed, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def _conv_native(job: Conv) -> Tensor:
    batch, channels_in, height, width = job.x.shape
    out = _conv_nothing(job)
    x, mask, residual = _rows(job.x), _rows(job.mask), _rows(job.residual)
    bias = None if job.bias is None else job.bias.contiguous()
    backends.native_op("conv3x3").run(
        _address(x),
        _address(mask),
        job.packed.data_ptr(),
        _address(bias),
        _address(residual),
        out.data_ptr(),
        batch,
        height,
        width,
        channels_in,
        job.channels_out,
        job.relu,
        torch.get_num_threads(),
    )
    return out


def _weight_gradient_native(x: Tensor, grad: Tensor) -> Tensor:
    batch, channels_in, height, width = x.shape
    rows, grads, out = _rows(x), _rows(grad), _weight_gradient_nothing(x, grad)
    backends.native_op("conv3x3").weight_gradient(
        _address(rows),
        _address(grads),
        out.data_ptr(),
        batch,
        height,
        width,
        channels_in,
        grad.shape[1],
        torch.get_num_threads(),
    )
    return out


def _rows(images: Tensor | None) -> Tensor | None:
    """In memory (B, H, W, C), whatever the strides of dimensions of size one."""
    if images is None or images.is_contiguous(memory_format=torch.channels_last):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _conv_nothing(job: Conv) -> Tensor:
    # No view of other memory: a model may change it in place.
    shape = (job.x.shape[0], job.channels_out, *job.x.shape[2:])
    return torch.empty(shape, dtype=torch.bfloat16, device=job.x.device, memory_format=torch.channels_last)


def _weight_gradient_nothing(x: Tensor, grad: Tensor) -> Tensor:
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def _pack_nothing(weight: Tensor, transposed: bool) -> Tensor:
    channels_out, channels_in = weight.shape[:2]
    shape = _packed_shape(channels_in, channels_out) if transposed else _packed_shape(channels_out, channels_in)
    return weight.new_empty(shape, dtype=torch.bfloat16)


def _pack(version: Version) -> Callable[[Tensor, bool], Tensor]:
    def call(weight: Tensor, transposed: bool) -> Tensor:
        if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
            raise ValueError(f"weight; got {weight.dtype} {tuple(weight.shape)}; accepted: floating point (K, C, 3, 3)")
        return version.pack(weight, transposed)

    return call


def _conv(version: Version) -> Callable[..., Tensor]:
    def call(
        x: Tensor,
        mask: Tensor | None,
        packed: Tensor,
        packed_transposed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        channels_out: int,
    ) -> Tensor:
        job = Conv(x, mask, packed, bias, residual, relu, channels_out)
        _check(job, packed_transposed)
        return version.conv(job)

    return call


def _weight_gradient(version: Version) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, grad: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or grad.dtype != torch.bfloat16:
            raise TypeError(f"x and grad; got {x.dtype} and {grad.dtype}; accepted: bfloat16")
        fits = x.dim() == grad.dim() == 4 and x.shape[0] == grad.shape[0] and x.shape[2:] == grad.shape[2:]
        if not fits or x.device != grad.device:
            got = f"{tuple(x.shape)} on {x.device} and {tuple(grad.shape)} on {grad.device}"
            raise ValueError(f"x and grad; got {got}; accepted: (B, C, H, W) and (B, K, H, W), on one device")
        return version.weight_gradient(x, grad)

    return call


def _weight_gradient_reference(x: Tensor, grad: Tensor) -> Tensor:
    return reference.weight_gradient(x, grad).contiguous(memory_format=torch.channels_last)


_REFERENCE = Version(reference.pack, lambda job: reference.conv3x3(*job), _weight_gradient_reference)
_NATIVE = Version(_pack_native, _conv_native, _weight_gradient_native)
_NOTHING = Version(_pack_nothing, _conv_nothing, _weight_gradient_nothing)
_cpu = _NATIVE if is_fast() else _REFERENCE

for _name, _form in (
    ("conv3x3_pack", _pack),
    ("conv3x3", _conv),
    ("conv3x3_weight_gradient", _weight_gradient),
):
    backends.LIB.impl(_name, _form(_REFERENCE), "CompositeExplicitAutograd")
    backends.LIB.impl(_name, _form(_cpu), "CPU")
    torch.library.register_fake(f"pbe_fast::{_name}", _form(_NOTHING), lib=backends.LIB)


class _Gradient(torch.autograd.Function):
    """The gradients of `conv3x3`; with `torch.library.register_autograd` they take as long as a small convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        packed: Tensor,
        packed_transposed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        channels_out: int,
    ) -> Tensor:
        output = _below(x, mask, packed, packed_transposed, bias, residual, relu, channels_out)
        ctx.save_for_backward(packed, packed_transposed, output if relu else None)
        ctx.channels_in = x.shape[1]
        ctx.has_residual = residual is not None
        ctx.has_mask = mask is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.has_mask:
            raise RuntimeError("gradient of conv3x3; got one with a mask, which is itself part of a gradient")
        packed, packed_transposed, output = ctx.saved_tensors
        if output is not None and ctx.has_residual:
            # Both take the same gradient, so it is written down.
            grad, output = torch.ops.aten.threshold_backward(grad, output, 0), None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _op(grad, output, packed_transposed, packed, None, None, False, ctx.channels_in)
        return grad_x, None, None, None, None, grad if ctx.has_residual else None, None, None


_op = torch.ops.pbe_fast.conv3x3.default


def _below(*args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = _op(*args)
    return out


def _with_gradient(*args: Any) -> Tensor:
    x, residual = args[0], args[5]
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        out: Tensor = _Gradient.apply(*args)
        return out
    return _below(*args)


backends.LIB.impl("conv3x3", _with_gradient, "Autograd")


def _named(backend: str, tensor: Tensor) -> Version:
    backends.require("conv3x3", backend)
    if backend == "native" and tensor.device.type != "cpu":
        raise ValueError(f"device; got {tensor.device}; accepted by backend 'native': cpu")
    return _REFERENCE if backend == "reference" else _NATIVE
