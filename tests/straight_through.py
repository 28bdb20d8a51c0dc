"""A function whose gradient is not what following its forward pass would give."""

from __future__ import annotations

import torch
from torch import Tensor


class Rounded(torch.autograd.Function):
    """To sixteenths; its gradient goes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad
