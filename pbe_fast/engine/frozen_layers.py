"""Frozen layers in the form that the CPU's kernels for bfloat16 compute, where this machine has them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.kernels.affine_relu import affine_relu
from pbe_fast.kernels.conv3x3 import conv3x3, is_fast, pack
from pbe_fast.kernels.conv_grad import Filters, conv2d, conv2d_pair
from pbe_fast.kernels.conv_grad import pack as pack_for_gradient

# With fewer channels the transformations outweigh the multiplications that they save.
_FEWEST_CHANNELS = 16


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution whose filters are transformed once, by `refresh`, and not at every call.

    Args:
        conv: One that `can_be_winograd`; weight and bias are its own, in float32.

    Attributes:
        relu: Whether the ReLU that followed it is part of it; also of the sum with a residual.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.relu = False
        self._packed = pack(self.weight)

    def refresh(self) -> None:
        """Takes the current weight, into the same memory."""
        fresh = pack(self.weight)
        self._packed.forward.copy_(fresh.forward)
        self._packed.backward.copy_(fresh.backward)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """In bfloat16 where autocast would have it so, in float32 elsewhere; ``residual`` is added to the result."""
        if not _in_bfloat16(input):
            return self._finish(super().forward(input), residual)
        if residual is None or self._can_add(input, residual):
            return conv3x3(input.to(torch.bfloat16), self._packed, self.bias, residual=residual, relu=self.relu)
        return self._finish(conv3x3(input.to(torch.bfloat16), self._packed, self.bias), residual)

    def _can_add(self, input: Tensor, residual: Tensor) -> bool:
        shape = (input.shape[0], self.out_channels, *input.shape[2:])
        return residual.dtype == torch.bfloat16 and residual.shape == shape

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        out = out if residual is None else out + residual
        return F.relu(out) if self.relu else out


class FastGradConv2d(nn.Conv2d):
    """A convolution whose input's gradient is `pbe_fast.kernels.conv_grad`, with its filters put in order by `refresh`.

    Args:
        conv: One that `can_have_fast_grad`; weight and bias are its own, in float32.

    Attributes:
        relu: Whether the ReLU that followed it is part of it.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            _both(conv.kernel_size),
            _both(conv.stride),
            _both(conv.padding),
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.relu = False
        # In a tuple it is no submodule: it has a name of its own.
        self._beside: tuple[BesideConv2d, ...] = ()
        self._filters = self._current()

    def pair_with(self, beside: BesideConv2d) -> None:
        """From now on `forward` returns the outputs of both, for `BesideConv2d.forward` to choose from."""
        self._beside = (beside,)
        self._filters = self._current()

    def refresh(self) -> None:
        """Takes the current weights, into the same memory."""
        for own, new in zip(self._filters, self._current(), strict=True):
            if isinstance(own, Tensor) and isinstance(new, Tensor):
                own.copy_(new)

    def forward(self, input: Tensor) -> Any:
        """In bfloat16 where autocast would have it so, in float32 elsewhere."""
        if not _in_bfloat16(input):
            out = super().forward(input)
            out = F.relu(out) if self.relu else out
            return (out, self._beside[0].alone(input)) if self._beside else out
        input = input.to(torch.bfloat16)
        if self._beside:
            return conv2d_pair(input, self._filters, self.bias, self._beside[0].bias, relu=self.relu)
        return conv2d(input, self._filters, self.bias, relu=self.relu)

    def _current(self) -> Filters:
        stride, padding = _both(self.stride), _both(self.padding)
        beside = self._beside[0].weight if self._beside else None
        return pack_for_gradient(self.weight, stride=stride, padding=padding, beside=beside)


class BesideConv2d(nn.Conv2d):
    """A 1 x 1 convolution of the same images as a `FastGradConv2d`, which computes both.

    Args:
        conv: One that `can_be_beside`; weight and bias are its own, in float32.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        bias = conv.bias is not None
        super().__init__(conv.in_channels, conv.out_channels, 1, _both(conv.stride), bias=bias, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def alone(self, input: Tensor) -> Tensor:
        """Its output for images."""
        return super().forward(input)

    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """Its own of both outputs."""
        return outputs[1]


class AffineReLU(nn.BatchNorm2d):
    """A batch normalisation in eval mode and the ReLU after it.

    Args:
        norm: Weight, bias and statistics are its own.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.eval()
        self._scale, self._shift = self._current()

    def refresh(self) -> None:
        """Takes the current weight, bias and statistics, into the same memory."""
        scale, shift = self._current()
        self._scale.copy_(scale)
        self._shift.copy_(shift)

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of the input."""
        if input.dtype == torch.bfloat16 and input.dim() == 4:
            return affine_relu(input, self._scale, self._shift)
        return F.relu(super().forward(input))

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift + self.bias if self.affine else shift


def _in_bfloat16(input: Tensor) -> bool:
    """Whether a batch of images is, or autocast would make it so."""
    return input.dim() == 4 and (input.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))


def has_fast_convolutions(device: torch.device) -> bool:
    """Whether the convolutions here are the faster ones for bfloat16 on a device."""
    # AMX multiplies many times faster than it loads: there Winograd's transformations cost more than they save. The
    # other gradients were not measured there.
    return device.type == "cpu" and is_fast() and not torch.cpu._is_amx_tile_supported()


def can_be_winograd(conv: nn.Module) -> bool:
    """Whether a convolution is of the kind that is faster so on this machine, in bfloat16."""
    return (
        _is_plain(conv)
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding in ((1, 1), "same")
        and min(conv.in_channels, conv.out_channels) >= _FEWEST_CHANNELS
    )


def can_have_fast_grad(conv: nn.Module) -> bool:
    """Whether the gradient of a convolution's input is faster by `pbe_fast.kernels.conv_grad`, in bfloat16."""
    if not _is_plain(conv) or isinstance(conv.padding, str) or conv.kernel_size == (1, 1):
        return False
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    square = len({*kernel}) == len({*stride}) == len({*padding}) == 1 and padding[0] < kernel[0]
    return square and (stride[0] > 1 or conv.in_channels < _FEWEST_CHANNELS)


def can_be_beside(conv: nn.Module, other: FastGradConv2d) -> bool:
    """Whether a convolution of the same images can be computed by the other."""
    return (
        _is_plain(conv)
        and conv.kernel_size == (1, 1)
        and conv.stride == other.stride
        and conv.padding == (0, 0)
        and other.kernel_size[0] == 2 * _both(other.padding) + 1
    )


def _is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(conv) is nn.Conv2d and conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.groups == 1


def _both(sizes: Any) -> int:
    """The one number that is given for each of two directions."""
    return int(sizes[0])
