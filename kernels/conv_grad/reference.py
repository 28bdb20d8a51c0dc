"""The gradient of a convolution's input, in plain PyTorch: the definition that the native version is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

# Sums in a register.
GROUP = 16


def pack(weight: Tensor, stride: int, padding: int, beside: Tensor | None = None) -> Tensor:
    """The filters in the order in which the native version reads them: one dimension, bfloat16.

    There are stride x stride kinds of pixels, by the remainders of their coordinates. To each kind belong the taps that
    reach it, line by line; what lies side by side in a line of gradients is multiplied as it lies there. Of images with
    few channels several neighbours share a register: each has the same filters, one pixel further on.

    Args:
        weight: (K, C, k, k).
        stride: Of the convolution, each way.
        padding: Likewise.
        beside: (K', C, 1, 1) of a convolution of the same images, stride and size of output.
    """
    channels_in, kernel = weight.shape[1:3]
    taps = weight.to(torch.bfloat16).permute(1, 2, 3, 0)
    unit = max(1, GROUP // channels_in)
    kinds = [list(range((i + padding) % stride, kernel, stride))[::-1] for i in range(stride)]
    packed = []
    for number, (rows, columns) in enumerate((rows, columns) for rows in kinds for columns in kinds):
        lines = _shifted(taps[:, rows][:, :, columns], unit)
        if number == 0 and beside is not None:
            other = _shifted(beside.to(torch.bfloat16).permute(1, 2, 3, 0), unit)
            lines = torch.cat([lines, other], dim=1)
        packed.append(F.pad(lines, (0, 0, 0, 0, 0, -lines.shape[0] % GROUP)).unflatten(0, (-1, GROUP)))
    return torch.cat([lines.transpose(1, 2).flatten() for lines in packed])


def _shifted(filters: Tensor, unit: int) -> Tensor:
    """(C, rows, columns, K) as (unit C, pairs of numbers, 2)."""
    if not filters.numel():
        return filters.new_zeros(unit * filters.shape[0], 0, 2)
    shifted = torch.cat([F.pad(filters, (0, 0, i, unit - 1 - i)) for i in range(unit)]).flatten(2)
    pairs: Tensor = F.pad(shifted, (0, shifted.shape[2] % 2)).flatten(1).unflatten(1, (-1, 2))
    return pairs


def conv_grad(
    grad: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    shape: tuple[int, ...],
    stride: int,
    padding: int,
    grad_beside: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """What `pbe_fast.kernels.conv_grad.conv_grad` computes: bfloat16 (B, C, H, W), channels_last."""
    masked = grad.float() if mask is None else grad.float().where(mask > 0, 0.0)
    out: Tensor = conv2d_input(shape, weight.float(), masked, stride, padding)
    if grad_beside is not None:
        assert beside is not None
        out = out + conv2d_input(shape, beside.float(), grad_beside.float(), stride)
    return out.to(torch.bfloat16, memory_format=torch.channels_last)
