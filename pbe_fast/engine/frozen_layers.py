"""Frozen layers in the form that a CPU's convolutions for bfloat16 are fastest in, where this machine has them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.engine import onednn
from pbe_fast.engine.side_by_side import SharingConv2d
from pbe_fast.kernels import backends
from pbe_fast.kernels.affine_relu import affine_relu, affine_relu_and
from pbe_fast.kernels.conv3x3 import conv3x3, conv3x3_and, is_fast, pack
from pbe_fast.kernels.conv_grad import Filters, conv2d, conv2d_pair
from pbe_fast.kernels.conv_grad import pack as pack_for_gradient

# With fewer channels the transformations outweigh the multiplications that they save.
_FEWEST_CHANNELS = 16


class WinogradConv2d(SharingConv2d):
    """A 3 x 3 convolution whose filters are transformed once, by `refresh`, and not at every call.

    Args:
        conv: One that `can_be_winograd`; weight and bias are its own, in float32.

    Attributes:
        relu: Whether the ReLU that followed it is part of it; also of the sum with a residual.
        passes_on: Whether `forward` also returns the images, for their one other reader: both gradients become one.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.relu = self.passes_on = False
        self._packed = pack(self.weight)

    def refresh(self) -> None:
        """Takes the current weight, into the same memory."""
        fresh = pack(self.weight)
        self._packed.forward.copy_(fresh.forward)
        self._packed.backward.copy_(fresh.backward)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """In bfloat16 where autocast would have it so, in float32 elsewhere; ``residual`` is added to the result."""
        if not self.passes_on:
            return self._computed(input, residual)
        if not _is_bfloat16(input):
            return self._computed(input), input
        return conv3x3_and(input, self._packed, self.bias, relu=self.relu)

    def _computed(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not in_bfloat16(input):
            return _finished(super().forward(input), residual, relu=self.relu)
        if residual is None or self._can_add(input, residual):
            return conv3x3(input.to(torch.bfloat16), self._packed, self.bias, residual=residual, relu=self.relu)
        return _finished(conv3x3(input.to(torch.bfloat16), self._packed, self.bias), residual, relu=self.relu)

    def _can_add(self, input: Tensor, residual: Tensor) -> bool:
        shape = (input.shape[0], self.out_channels, *input.shape[2:])
        return residual.dtype == torch.bfloat16 and residual.shape == shape


class PostOpConv2d(SharingConv2d):
    """A convolution by oneDNN with what follows it.

    Args:
        conv: One that `can_have_post_ops`; weight and bias are its own, in float32.

    Attributes:
        relu: Whether the ReLU that followed it is part of it; also of the sum with a residual.
        passes_on: Whether `forward` also returns the images, for their one other reader: both gradients become one.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.relu = self.passes_on = False
        self._filters = onednn.Filters(self.weight, self.geometry)
        self._finite = self._is_finite()

    def refresh(self) -> None:
        """Takes the current weight."""
        self._filters.forget()
        self._finite = self._is_finite()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """In bfloat16 where autocast would have it so, in float32 elsewhere; ``residual`` is added to the result."""
        if not self.passes_on:
            return self._computed(input, residual)
        if not _is_bfloat16(input) or not self._finite:
            return self._computed(input), input
        images = input.contiguous(memory_format=torch.channels_last)
        return onednn.conv2d_and(images, self._filters, self.bias, relu=self.relu)

    def _computed(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # The compiler cannot look into oneDNN's filters, and fuses by itself. What is not a number oneDNN's ReLU makes
        # zero: a model that has diverged would have finite logits.
        if not in_bfloat16(input) or not self._finite or torch.compiler.is_compiling():
            out = super().forward(input)
            return _finished(out, residual, relu=self.relu)
        images = input.to(torch.bfloat16, memory_format=torch.channels_last)
        if residual is None:
            return onednn.conv2d(images, self._filters, self.bias, relu=self.relu)
        # oneDNN adds nothing to convolutions in groups.
        addable = residual.dtype == torch.bfloat16 and residual.shape == self._shape_for(images)
        if addable and self.groups == 1:
            residual = residual.contiguous(memory_format=torch.channels_last)
            return onednn.conv2d(images, self._filters, self.bias, residual=residual, relu=self.relu)
        return _finished(onednn.conv2d(images, self._filters, self.bias), residual, relu=self.relu)

    def _is_finite(self) -> bool:
        values = [self.weight] if self.bias is None else [self.weight, self.bias]
        return all(bool(value.isfinite().all()) for value in values)

    def _shape_for(self, images: Tensor) -> tuple[int, ...]:
        stride, padding, dilation, _ = self.geometry
        axes = zip(images.shape[2:], self.kernel_size, stride, padding, dilation, strict=True)
        sides = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
        return (images.shape[0], self.out_channels, *sides)


class FastGradConv2d(SharingConv2d):
    """A convolution whose input's gradient is `pbe_fast.kernels.conv_grad`, with its filters put in order by `refresh`.

    Args:
        conv: One that `can_have_fast_grad`; weight and bias are its own, in float32.

    Attributes:
        relu: Whether the ReLU that followed it is part of it.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
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
        if not in_bfloat16(input):
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


class BesideConv2d(SharingConv2d):
    """A 1 x 1 convolution of the same images as a `FastGradConv2d`, which computes both.

    Args:
        conv: One that `can_be_beside`; weight and bias are its own, in float32.
    """

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

    Attributes:
        passes_on: As of `WinogradConv2d`.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.eval()
        self.passes_on = False
        self._scale, self._shift = self._current()

    def refresh(self) -> None:
        """Takes the current weight, bias and statistics, into the same memory."""
        scale, shift = self._current()
        self._scale.copy_(scale)
        self._shift.copy_(shift)

    def forward(self, input: Tensor) -> Any:
        """In the dtype of the input."""
        if self.passes_on and _is_bfloat16(input):
            return affine_relu_and(input, self._scale, self._shift)
        if input.dtype == torch.bfloat16 and input.dim() == 4:
            out = affine_relu(input, self._scale, self._shift)
        else:
            out = F.relu(super().forward(input))
        return (out, input) if self.passes_on else out

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift + self.bias if self.affine else shift


def _finished(out: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def in_bfloat16(input: Tensor) -> bool:
    """Whether a batch of images is, or autocast would make it so."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return input.dim() == 4 and (input.dtype == torch.bfloat16 or autocast)


def _is_bfloat16(input: Tensor) -> bool:
    """Whether a batch of images is; never under the compiler, which joins gradients by itself."""
    return input.dim() == 4 and input.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


def has_fast_convolutions(device: torch.device) -> bool:
    """Whether the convolutions here are the faster ones for bfloat16 on a device."""
    # AMX multiplies many times faster than it loads: there Winograd's transformations cost three to six times what they
    # save, and the other gradients up to three times.
    return device.type == "cpu" and is_fast() and not onednn.has_amx()


def has_post_ops(device: torch.device) -> bool:
    """Whether oneDNN's convolutions, with what follows them, are the faster ones for bfloat16 on a device.

    Without the native build the frozen normalisations beside them would take longer than they save.
    """
    own = backends.missing("affine_relu", "native") is None
    return device.type == "cpu" and own and onednn.has_amx() and onednn.is_usable()


def can_have_post_ops(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution is of the kind that oneDNN computes with what follows it."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    # Where outputs lie in the padding, dilated ones read outside of the images on AMX.
    axes = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    return all(d == 1 or 2 * int(p) <= d * (k - 1) for k, p, d in axes)


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
