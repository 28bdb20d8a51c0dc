"""Batch normalisation by the batch's own statistics, then ReLU, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, H, W) in the dtype of ``x``; mean and biased variance (C,), all computed in float32."""
    wide = x.float()
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale, shift = _affine(weight, bias, mean, variance, eps)
    y = _planes(scale) * wide + _planes(shift)
    return (y.relu() if relu else y).to(x.dtype), mean, variance


def batch_norm_backward(
    grad: Tensor,
    beside: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in its dtype, and of weight and bias, in float32, also where these are not given.

    To that of x ``beside`` is added, if there is one, before it is rounded.
    """
    scale, shift = _affine(weight, bias, mean, variance, eps)
    wide, g = x.float(), grad.float()
    if relu:
        y = _planes(scale) * wide + _planes(shift)
        g = g.where(~(y <= 0), 0.0)
    inverse = torch.rsqrt(variance + eps)
    away = wide - _planes(mean)
    grad_bias = g.sum((0, 2, 3))
    grad_weight = (g * away).sum((0, 2, 3)) * inverse
    pixels = x.numel() // x.shape[1]
    rest = _planes(grad_bias / pixels) + _planes(grad_weight * inverse / pixels) * away
    grad_x = _planes(scale) * (g - rest)
    return (grad_x if beside is None else grad_x + beside.float()).to(x.dtype), grad_weight, grad_bias


def _affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _planes(channels: Tensor) -> Tensor:
    return channels.view(-1, 1, 1)
