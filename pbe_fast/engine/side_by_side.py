"""Small images of a batch side by side on fewer, wider ones, for convolutions that read their filters once per image.

oneDNN's convolutions on AMX do: 4 x 4 pixels are one tile, for which all filters are read again, and those of 512
channels (4.7 MB) do not stay in the second cache. The gradient of the filters, a product over pixels, needs wide images
even more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.kernels.backends import applied

# Images of no more pixels than this are small: four tiles of AMX.
_FEW_PIXELS = 64
# Filters of more bytes than this leave the second cache.
_LARGE_FILTERS = 1 << 20
# More images side by side are no faster.
_MOST = 16


class Geometry(NamedTuple):
    """Of a convolution of images: each of the first three is (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def keeps_size(self, kernel: Sequence[int]) -> bool:
        """Whether outputs are as many as inputs but for the stride."""
        return all(d * (k - 1) == 2 * p for d, k, p in zip(self.dilation, kernel, self.padding, strict=True))


class SharingConv2d(nn.Conv2d):
    """The same convolution as another, on its own parameters: what others compute in another way derives from it.

    Args:
        conv: Weight and bias are its own.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias

    @property
    def geometry(self) -> Geometry:
        """Of one whose padding is given in pixels."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """How the images of a batch, and a convolution's outputs of them, lie side by side.

    Attributes:
        batch: Images.
        together: How many lie side by side.
        width: Of one.
        period: From one's first column to the next one's.
        step: The convolution's horizontal stride, of which ``period`` is a multiple: every image's outputs begin where
            an output does.
    """

    batch: int
    together: int
    width: int
    period: int
    step: int

    @property
    def wide(self) -> tuple[int, int]:
        """How many wide images there are, and how wide they are."""
        return -(-self.batch // self.together), self.together * self.period

    def lay(self, images: Tensor) -> Tensor:
        """(B, C, H, W) as fewer images, ``together * period`` wide; zeros between them are the padding of both."""
        return _laid(images, self.together, self.period)

    def lay_outputs(self, outputs: Tensor) -> Tensor:
        """The same of what has the size of outputs."""
        return _laid(outputs, self.together, self.period // self.step)

    def take(self, wide: Tensor) -> Tensor:
        """The images of `lay` again, (B, C, H, W), channels_last."""
        return _taken(wide, self.batch, self.together, self.width)

    def take_outputs(self, wide: Tensor) -> Tensor:
        """The outputs of the images, without those in between."""
        return _taken(wide, self.batch, self.together, -(-self.width // self.step))


def row_of(shape: Sequence[int], geometry: Geometry, kernel: Sequence[int]) -> Row | None:
    """How to lay images of (B, C, H, W) for a convolution; None where that helps nothing."""
    batch, _, height, width = shape
    threads = torch.get_num_threads()
    # oneDNN's gradients of wide images in groups are wrong (dilated, one channel each).
    if batch < 2 * threads or geometry.groups > 1 or height * width > _FEW_PIXELS or not geometry.keeps_size(kernel):
        return None
    # As many wide images for each thread as for the others.
    rows = threads * -(-batch // (_MOST * threads))
    together = -(-batch // rows)
    step, side = geometry.stride[1], geometry.padding[1]
    return Row(batch, together, width, -(-(width + side) // step) * step, step)


def has_large_filters(weight: Tensor) -> bool:
    """Whether the filters of a convolution in bfloat16 leave the second cache before the next image comes."""
    return weight.numel() * 2 >= _LARGE_FILTERS


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, row: Row) -> Tensor:
    """``F.conv2d`` with all of its gradients; with small filters only theirs is of images laid as ``row`` says.

    Args:
        x: (B, C, H, W), channels_last.
        weight: (K, C / groups, k, k') in the dtype of ``x``, as the rest.
        bias: (K,).
        geometry: Of the convolution.
        row: From `row_of`.

    Returns:
        (B, K, H', W'), channels_last.
    """
    return applied(_Convolution, x, weight, bias, geometry, row)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, row: Row) -> Tensor:
        ctx.geometry, ctx.row, ctx.large = geometry, row, has_large_filters(weight)
        x = row.lay(x) if ctx.large else x
        ctx.save_for_backward(x, weight)
        out = F.conv2d(x, weight, bias, *geometry)
        return row.take_outputs(out) if ctx.large else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        row, wanted = ctx.row, list(ctx.needs_input_grad[:3])
        if ctx.large:
            grad_x, *others = conv_gradients(row.lay_outputs(grad), x, weight, ctx.geometry, wanted)
            return None if grad_x is None else row.take(grad_x), *others, None, None
        grad_x, *_ = conv_gradients(grad, x, weight, ctx.geometry, [wanted[0], False, False])
        _, *others = conv_gradients(row.lay_outputs(grad), row.lay(x), weight, ctx.geometry, [False, *wanted[1:]])
        return grad_x, *others, None, None


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of a convolution's images, weight and bias, as far as they are wanted."""
    stride, padding, dilation, groups = geometry
    back = torch.ops.aten.convolution_backward
    out: tuple[Tensor | None, ...] = back(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return out


def _laid(images: Tensor, together: int, period: int) -> Tensor:
    batch, channels, height, width = images.shape
    rows = -(-batch // together)
    wide = images.new_zeros(rows, height, together, period, channels)
    # (row, place, H, W, C)
    places, source = wide.transpose(1, 2)[:, :, :, :width], images.permute(0, 2, 3, 1)
    full = batch // together
    if full:
        places[:full] = source[: full * together].unflatten(0, (full, together))
    if full < rows:
        places[full, : batch - full * together] = source[full * together :]
    return wide.flatten(2, 3).permute(0, 3, 1, 2)


def _taken(wide: Tensor, batch: int, together: int, width: int) -> Tensor:
    rows, channels, height, total = wide.shape
    # (row, place, H, W, C)
    places = wide.permute(0, 2, 3, 1).unflatten(2, (together, total // together)).transpose(1, 2)[:, :, :, :width]
    # No view of other memory: a model may change it in place.
    images = torch.empty(
        (batch, channels, height, width), dtype=wide.dtype, device=wide.device, memory_format=torch.channels_last
    )
    target, full = images.permute(0, 2, 3, 1), batch // together
    if full:
        target[: full * together].unflatten(0, (full, together)).copy_(places[:full])
    if full < rows:
        target[full * together :] = places[full, : batch - full * together]
    return images
