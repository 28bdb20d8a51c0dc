"""Layers as the CPU's kernels for bfloat16 compute them, where this machine has them: frozen ones, and in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

from pbe_fast.kernels.affine_relu import affine_relu
from pbe_fast.kernels.backends import applied
from pbe_fast.kernels.conv3x3 import Packed, conv3x3, is_fast, pack, weight_gradient

# With fewer channels the transformations outweigh the multiplications that they save.
_FEWEST_CHANNELS = 16
# In training the filters are transformed at every call: for fewer tiles than this that is not worth it.
_FEWEST_TILES = 256
# The weight's gradient sums 16 numbers for each pair of channels: of more pairs they do not stay in the cache.
_MOST_PAIRS = 256 * 256


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
        if input.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
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


def is_winograd_machine(device: torch.device) -> bool:
    """Whether the convolutions here are the faster ones for bfloat16 on a device."""
    # AMX multiplies many times faster than it loads: there the transformations cost more than they save.
    return device.type == "cpu" and is_fast() and not torch.cpu._is_amx_tile_supported()


def can_be_winograd(conv: nn.Module) -> bool:
    """Whether a convolution is of the kind that is faster so on this machine, in bfloat16."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and _suits(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)
        and is_winograd_machine(conv.weight.device)
    )


class winograd_in_training(TorchFunctionMode):
    """Context: what calls ``F.conv2d`` under autocast to bfloat16 on a CPU gets Winograd's convolution where it fits.

    Weights may take gradients: they are summed in float32, and the filters are transformed at every call.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every other function is called as it is."""
        if func is F.conv2d and not torch.compiler.is_compiling():
            call = _Call(*args, **(kwargs or {}))
            if call.suits():
                return applied(_TrainedConv, call.input.to(torch.bfloat16), call.weight, call.bias)
        return func(*args, **(kwargs or {}))


class _Call:
    """The arguments of ``F.conv2d``."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        self.input, self.weight, self.bias = input, weight, bias
        self._options = (stride, padding, dilation, groups)

    def suits(self) -> bool:
        x, weight = self.input, self.weight
        return (
            torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and x.dim() == 4
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.shape[1] == weight.shape[1]
            and x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) >= _FEWEST_TILES
            and _suits(weight, *self._options)
        )


def _suits(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    return (
        weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
        and groups == 1
        and padding in (1, (1, 1), [1, 1], "same")
        and all(one in (1, (1, 1), [1, 1]) for one in (stride, dilation))
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


class _TrainedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packed = pack(weight)
        ctx.save_for_backward(x, packed.forward, packed.backward)
        return conv3x3(x, packed, None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, *filters = ctx.saved_tensors
        channels = grad.shape[1], x.shape[1]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = conv3x3(grad, Packed(filters[1], filters[0], x.shape[1]))
        if ctx.needs_input_grad[1]:
            if channels[0] * channels[1] <= _MOST_PAIRS:
                grad_weight = weight_gradient(x, grad)
            else:
                grad_weight = conv2d_weight(x, (*channels, 3, 3), grad, padding=1).float()
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        return grad_x, grad_weight, grad_bias
