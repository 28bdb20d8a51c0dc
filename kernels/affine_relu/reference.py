"""relu(scale x + shift) in plain PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(B, C, H, W) in the dtype and layout of ``x``, computed in float32."""
    return (x.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu().to(x.dtype)


def affine_relu_backward(grad: Tensor, y: Tensor, scale: Tensor | None, beside: Tensor | None) -> Tensor:
    """The gradient of ``x``, in the dtype of ``grad``: scale grad where y > 0, plus ``beside``; no scale is 1."""
    if scale is None and beside is None:
        return grad.where(y > 0, 0.0)
    wide = grad.float() if scale is None else grad.float() * scale.view(-1, 1, 1)
    wide = wide.where(y > 0, 0.0)
    return (wide if beside is None else wide + beside.float()).to(grad.dtype)
