"""Convolutions with what follows them, by oneDNN: a ReLU and a sum with a residual need no pass over memory then.

The operators are those that torch's compiler calls; they are not documented, and so are tried out before they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.engine.side_by_side import Geometry, Row, conv_gradients, has_large_filters, row_of
from pbe_fast.kernels.affine_relu import relu_backward
from pbe_fast.kernels.backends import applied


class Filters:
    """The filters of one convolution, put in order for images of each shape that it meets, when it meets them.

    A copy of it, or what is unpickled, has yet to put them in order.

    Args:
        weight: (K, C / groups, k, k'); read in bfloat16 whenever they are put in order.
        geometry: Of the convolution.
    """

    # Shapes for which they are kept: the batches of an attack and of a ranking, and the last, smaller ones.
    _KEPT = 2

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self._weight, self.geometry = weight, geometry
        self._plain: Tensor | None = None
        self._turned: Tensor | None = None
        self._packed: dict[tuple[bool, torch.Size], Tensor] = {}

    def __reduce__(self) -> Any:
        return Filters, (self._weight, self.geometry)

    def forget(self) -> None:
        """The weight has changed."""
        self._plain = self._turned = None
        self._packed.clear()

    @property
    def plain(self) -> Tensor:
        """As they are, in bfloat16."""
        if self._plain is None:
            self._plain = self._weight.detach().to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        return self._plain

    @property
    def gradient(self) -> Geometry | None:
        """Of the convolution that the gradient is, with the filters turned; None where it is none."""
        stride, padding, dilation, groups = self.geometry
        vertical, horizontal = (d * (k - 1) - p for d, k, p in zip(dilation, self.kernel, padding, strict=True))
        if groups != 1 or stride != (1, 1) or min(vertical, horizontal) < 0:
            return None
        return Geometry(stride, (vertical, horizontal), dilation, 1)

    @property
    def kernel(self) -> tuple[int, int]:
        """Its height and width."""
        return self._weight.shape[2], self._weight.shape[3]

    def for_output(self, x: Tensor) -> Tensor:
        """In the order for such images; an opaque tensor."""
        return self._in_order(x, self.geometry, turned=False)

    def for_gradient(self, grad: Tensor) -> Tensor:
        """Turned, where `gradient` says how, in the order for such gradients."""
        assert self.gradient is not None
        return self._in_order(grad, self.gradient, turned=True)

    def row_of(self, shape: Sequence[int]) -> Row | None:
        """How images of such a shape are to lie side by side, so that large filters are read once for many of them."""
        return row_of(shape, self.geometry, self.kernel) if has_large_filters(self._weight) else None

    def _in_order(self, images: Tensor, geometry: Geometry, *, turned: bool) -> Tensor:
        key = (turned, images.shape)
        packed = self._packed.get(key)
        if packed is None:
            if len(self._packed) >= 2 * self._KEPT:
                self._packed.clear()
            weight = self.plain
            if turned:
                if self._turned is None:
                    self._turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
                weight = self._turned
            stride, padding, dilation, groups = geometry
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            packed = self._packed[key] = reorder(weight, padding, stride, dilation, groups, list(images.shape))
        return packed


def conv2d(
    x: Tensor, filters: Filters, bias: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """``F.conv2d`` of bfloat16 images on a CPU, with a residual added and negative results made zero.

    Args:
        x: bfloat16 (B, C, H, W), channels_last.
        filters: The weight gets no gradient.
        bias: (K,). It gets no gradient.
        residual: bfloat16 (B, K, H', W').
        relu: After the addition.

    Returns:
        bfloat16 (B, K, H', W'). Gradients flow to ``x`` and ``residual``.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return applied(_Convolution, x, filters, bias, residual, relu)
    return _conv(x, filters, bias, residual, relu)


def conv2d_and(x: Tensor, filters: Filters, bias: Tensor | None = None, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """`conv2d`, and ``x`` itself for its one other reader, whose gradient is added by oneDNN where it can be."""
    if torch.is_grad_enabled() and x.requires_grad:
        out, same = applied(_ConvolutionAnd, x, filters, bias, None, relu)
        return out, same
    return _conv(x, filters, bias, None, relu), x


def has_amx() -> bool:
    """Whether this processor multiplies tiles of bfloat16, which oneDNN's convolutions here are made of."""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def is_usable() -> bool:
    """Whether this torch has the operators, and they compute here what they should."""
    try:
        return _is_right()
    except Exception:
        return False


def _is_right() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, dtype=torch.float32, generator=generator, device="cpu").to(torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    x, weight, bias, residual = draw(2, 32, 8, 8), draw(16, 32, 3, 3), draw(16), draw(2, 16, 8, 8)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    exact = F.conv2d(x.float(), weight.float(), bias.float(), padding=1) + residual.float()
    with torch.no_grad():
        for relu in (False, True):
            got = _conv(x, Filters(weight, geometry), bias, residual, relu).float()
            if not torch.allclose(got, exact.relu() if relu else exact, rtol=0.02, atol=0.1):
                return False
    return True


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, filters, _, residual, relu = arguments
        out = _conv(*arguments)
        ctx.save_for_backward(out if relu else None)
        ctx.filters, ctx.shape, ctx.has_residual = filters, x.shape, residual is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, beside: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if out is not None:
            grad = relu_backward(grad, out)
        grad_x = _gradient(grad, ctx.filters, ctx.shape, beside) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad if ctx.has_residual else None, None


class _ConvolutionAnd(_Convolution):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _Convolution.forward(ctx, *arguments), arguments[0]


def _conv(x: Tensor, filters: Filters, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    row = filters.row_of(x.shape)
    if row is None:
        return _pointwise(x, filters.for_output(x), filters.geometry, bias, residual, relu)
    wide = row.lay(x)
    residual = None if residual is None else row.lay_outputs(residual)
    return row.take_outputs(_pointwise(wide, filters.for_output(wide), filters.geometry, bias, residual, relu))


def _gradient(grad: Tensor, filters: Filters, shape: torch.Size, beside: Tensor | None) -> Tensor:
    """Of the images, of such a shape, that a convolution reads; plus ``beside``."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    row = filters.row_of(shape)
    if row is not None:
        grad = row.lay_outputs(grad)
    geometry = filters.gradient
    if geometry is not None:
        if beside is not None:
            beside = beside.contiguous(memory_format=torch.channels_last) if row is None else row.lay(beside)
        out = _pointwise(grad, filters.for_gradient(grad), geometry, None, beside, False)
        return out if row is None else row.take(out)
    if row is not None:
        shape = torch.Size((row.wide[0], *shape[1:3], row.wide[1]))
    # Only the shape of the images is looked at.
    images = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    (grad_x, *_) = conv_gradients(grad, images, filters.plain, filters.geometry, [True, False, False])
    assert grad_x is not None
    grad_x = grad_x if row is None else row.take(grad_x)
    return grad_x if beside is None else grad_x.add_(beside)


def _pointwise(
    x: Tensor, packed: Tensor, geometry: Geometry, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    stride, padding, dilation, groups = geometry
    short = None if bias is None else bias.to(torch.bfloat16)
    op = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        after = "relu" if relu else "none"
        out: Tensor = op(x, packed, short, padding, stride, dilation, groups, after, [], "")
    else:
        after_sum = "relu" if relu else None
        out = op.binary(x, residual, packed, short, padding, stride, dilation, groups, "add", None, after_sum, [], "")
    return out
