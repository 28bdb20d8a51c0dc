"""The gradient of a convolution's input: ``torch.ops.pbe_fast.conv_grad``, and convolutions that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.kernels import backends
from pbe_fast.kernels.conv_grad import reference

backends.LIB.define(
    "conv_grad(Tensor grad, Tensor? mask, Tensor weight, Tensor packed, int height, int width, int stride, "
    "int padding, Tensor? grad_beside, Tensor? beside) -> Tensor"
)


class Filters(NamedTuple):
    """The filters of one convolution, or of two of the same images.

    Attributes:
        weight: bfloat16 (K, C, k, k), channels_last.
        packed: In the order in which the gradient reads them; see `reference.pack`.
        stride, padding: The same each way.
        beside: bfloat16 (K', C, 1, 1), of a convolution with the same stride and without padding, or None.
    """

    weight: Tensor
    packed: Tensor
    stride: int
    padding: int
    beside: Tensor | None


def pack(weight: Tensor, *, stride: int = 1, padding: int = 0, beside: Tensor | None = None) -> Filters:
    """The filters as the functions here take them.

    Args:
        weight: (K, C, k, k) floating point. It gets no gradient.
        stride: At least 1.
        padding: At least 0, and less than k.
        beside: (K', C, 1, 1); then k is 2 padding + 1, which makes outputs of the same size.

    Raises:
        ValueError: Another shape, stride or padding.
    """
    if weight.dim() != 4 or weight.numel() == 0 or weight.shape[2] != weight.shape[3] or not weight.is_floating_point():
        raise ValueError(f"weight; got {weight.dtype} {tuple(weight.shape)}; accepted: floating point (K, C, k, k)")
    kernel = weight.shape[2]
    if stride < 1 or not 0 <= padding < kernel:
        got = f"{stride} and {padding}"
        raise ValueError(f"stride and padding; got {got}; accepted: at least 1, and 0 to {kernel - 1}")
    short = weight.detach().to(torch.bfloat16, memory_format=torch.channels_last)
    if beside is None:
        return Filters(short, reference.pack(short, stride, padding), stride, padding, None)
    if beside.dim() != 4 or beside.numel() == 0 or beside.shape[1:] != (weight.shape[1], 1, 1):
        raise ValueError(f"beside; got {tuple(beside.shape)}; accepted: (K', {weight.shape[1]}, 1, 1)")
    if kernel != 2 * padding + 1:
        raise ValueError(f"padding; got {padding}; accepted beside another convolution: {(kernel - 1) / 2}")
    other = beside.detach().to(torch.bfloat16, memory_format=torch.channels_last)
    return Filters(short, reference.pack(short, stride, padding, other), stride, padding, other)


def conv2d(x: Tensor, filters: Filters, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``F.conv2d`` of bfloat16 images, whose gradient is `conv_grad`.

    Args:
        x: bfloat16 (B, C, H, W), any layout.
        filters: From `pack`.
        bias: (K,). It gets no gradient.
        relu: Whether negative results become zero.

    Returns:
        bfloat16 (B, K, H', W'). Gradients flow to ``x``.

    Raises:
        ValueError: No batch of images, or filters of two convolutions.
    """
    _check_images(x, filters, of_two=False)
    return backends.applied(_Convolutions, x, filters, bias, None, relu)


def conv2d_pair(
    x: Tensor, filters: Filters, bias: Tensor | None, bias_beside: Tensor | None, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """Both convolutions of ``filters``, the second without a ReLU: their gradients become one, in one pass.

    Raises:
        ValueError: No batch of images, or filters of one convolution.
    """
    _check_images(x, filters, of_two=True)
    out, out_beside = backends.applied(_Convolutions, x, filters, bias, bias_beside, relu)
    return out, out_beside


def conv_grad(
    grad: Tensor,
    filters: Filters,
    size: tuple[int, int],
    *,
    mask: Tensor | None = None,
    grad_beside: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The gradient of the images that one convolution reads, or two.

    Args:
        grad: bfloat16 (B, K, H', W'), of the outputs.
        filters: From `pack`.
        size: H and W of the images.
        mask: As ``grad``: where it is not above zero, ``grad`` counts as zero.
        grad_beside: bfloat16 (B, K', H', W'), where ``filters`` has others beside.
        backend: "reference" or "native" by name; None lets the dispatcher choose by device.

    Returns:
        bfloat16 (B, C, H, W), channels_last, summed in float32 and rounded once.

    Raises:
        ValueError: Shapes or devices that do not fit together, or a backend for another device.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.
    """
    run = torch.ops.pbe_fast.conv_grad.default if backend is None else _named(backend, grad)
    weight, packed, stride, padding, beside = filters
    out: Tensor = run(grad, mask, weight, packed, *size, stride, padding, grad_beside, beside)
    return out


def is_fast() -> bool:
    """Whether the native version runs here: it was built, and the processor has AVX512-BF16."""
    return backends.missing("conv_grad", "native") is None


class _Convolutions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Filters, bias: Tensor | None, bias_beside: Tensor | None, relu: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight, packed, stride, padding, beside = filters
        out = F.conv2d(x, weight, _short(bias), stride, padding)
        out = out.relu_() if relu else out
        ctx.save_for_backward(weight, packed, beside, out if relu else None)
        ctx.geometry = (*x.shape[2:], stride, padding)
        return out if beside is None else (out, F.conv2d(x, beside, _short(bias_beside), stride))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        weight, packed, beside, output = ctx.saved_tensors
        op = torch.ops.pbe_fast.conv_grad.default
        return op(grad, output, weight, packed, *ctx.geometry, grad_beside, beside), None, None, None, None


def _check_images(x: Tensor, filters: Filters, *, of_two: bool) -> None:
    if x.dim() != 4:
        raise ValueError(f"x; got shape {tuple(x.shape)}; accepted: (B, C, H, W)")
    if (filters.beside is not None) != of_two:
        got, accepted = ("one", "two") if of_two else ("two", "one")
        raise ValueError(f"filters; got those of {got} convolution(s); accepted: of {accepted}")


def _short(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.bfloat16)


class _Job(NamedTuple):
    """The arguments of the operator."""

    grad: Tensor
    mask: Tensor | None
    weight: Tensor
    packed: Tensor
    height: int
    width: int
    stride: int
    padding: int
    grad_beside: Tensor | None
    beside: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.grad.shape[0], self.weight.shape[1], self.height, self.width)

    def check(self) -> None:
        weight, kernel = self.weight, self.weight.shape[-1]
        if weight.dim() != 4 or weight.numel() == 0 or weight.shape[2] != kernel:
            raise ValueError(f"weight; got {tuple(weight.shape)}; accepted: (K, C, k, k)")
        if self.stride < 1 or not 0 <= self.padding < kernel:
            raise ValueError(f"stride and padding; got {self.stride} and {self.padding}; accepted: as from pack")
        sides = tuple((n + 2 * self.padding - kernel) // self.stride + 1 for n in (self.height, self.width))
        if min(sides) < 1 or min(self.height, self.width) < 1:
            got = f"{self.height} x {self.width}"
            raise ValueError(f"height and width; got {got}; accepted: as large as a kernel of {kernel}")
        outputs = (self.grad.shape[0], weight.shape[0], *sides)
        backends.require_bf16("grad", self.grad, outputs, weight.device)
        if self.mask is not None:
            backends.require_bf16("mask", self.mask, outputs, weight.device)
        if (self.grad_beside is None) != (self.beside is None):
            raise ValueError("grad_beside; got one without the other; accepted: with filters beside, and without none")
        if self.beside is not None and self.grad_beside is not None:
            channels = self.beside.shape[0]
            backends.require_bf16("beside", self.beside, (channels, weight.shape[1], 1, 1), weight.device)
            outputs = (self.grad.shape[0], channels, *sides)
            backends.require_bf16("grad_beside", self.grad_beside, outputs, weight.device)
        size = (_packed_size(weight.shape, self.stride, self.padding, self.beside),)
        backends.require_bf16("packed", self.packed, size, weight.device)
        if not self.packed.is_contiguous():
            raise ValueError("packed; got strides; accepted: contiguous, as from pack")

    def empty(self) -> Tensor:
        # No view of other memory: a model may change it in place.
        format = torch.channels_last
        return torch.empty(self.shape, dtype=torch.bfloat16, device=self.grad.device, memory_format=format)


def _packed_size(shape: torch.Size, stride: int, padding: int, beside: Tensor | None) -> int:
    channels_out, channels_in, kernel, _ = shape
    unit = max(1, reference.GROUP // channels_in)
    taps = [len(range((i + padding) % stride, kernel, stride)) for i in range(stride)]
    pairs = sum(
        rows * (-(-(columns + unit - 1) * channels_out // 2)) for rows in taps for columns in taps if columns > 0
    )
    pairs += 0 if beside is None else -(-unit * beside.shape[0] // 2)
    return -(-unit * channels_in // reference.GROUP) * reference.GROUP * 2 * pairs


def _reference(job: _Job) -> Tensor:
    return reference.conv_grad(
        job.grad, job.mask, job.weight, job.shape, job.stride, job.padding, job.grad_beside, job.beside
    )


def _native(job: _Job) -> Tensor:
    out = job.empty()
    grad, mask, beside = (
        None if tensor is None else backends.channels_last(tensor) for tensor in (job.grad, job.mask, job.grad_beside)
    )
    assert grad is not None
    backends.native_op("conv_grad").run(
        grad.data_ptr(),
        backends.address(mask),
        backends.address(beside),
        job.packed.data_ptr(),
        out.data_ptr(),
        grad.shape[0],
        job.height,
        job.width,
        out.shape[1],
        *grad.shape[2:],
        grad.shape[1],
        0 if beside is None else beside.shape[1],
        job.weight.shape[2],
        job.stride,
        job.padding,
        torch.get_num_threads(),
    )
    return out


def _checked(run: Callable[[_Job], Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        job = _Job(*arguments)
        job.check()
        return run(job)

    return call


_VERSIONS = {"reference": _checked(_reference), "native": _checked(_native)}
backends.implement(
    "conv_grad",
    reference=_VERSIONS["reference"],
    cpu=_VERSIONS["native" if is_fast() else "reference"],
    fake=_checked(_Job.empty),
)


def _named(backend: str, tensor: Tensor) -> Callable[..., Tensor]:
    backends.require("conv_grad", backend, tensor)
    return _VERSIONS[backend]
