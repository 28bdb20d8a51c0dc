"""The definition of a PGD step, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# Gradients of a norm outside of these bounds give no L2 step: there the norm or its inverse is no normal float32.
SMALLEST_NORM, LARGEST_NORM = 2.0**-126, 2.0**126

PER_IMAGE = (1, 2, 3)


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    alpha: float,
    norm: str,
    mean: Tensor | None,
    std: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One step of projected gradient ascent, and the model's next input; arguments as in the public function."""
    grad = grad.float()
    if norm == "linf":
        # sign(g), with 0 for NaN
        sign = (grad > 0).float() - (grad < 0).float()
        delta = (adv + alpha * sign - origin).clamp(-eps, eps)
    else:
        if std is not None:
            grad = grad / std.view(1, -1, 1, 1)  # chain rule: grad is taken at the normalised input
        length = torch.linalg.vector_norm(grad, dim=PER_IMAGE, keepdim=True, dtype=torch.float64)
        has_step = (length >= SMALLEST_NORM) & (length <= LARGEST_NORM)  # False for NaN
        direction = torch.where(has_step, grad / length, 0.0).float()
        delta = adv + alpha * direction - origin
        radius = torch.linalg.vector_norm(delta, dim=PER_IMAGE, keepdim=True, dtype=torch.float64)
        delta = delta * torch.where(radius > eps, eps / radius, 1.0).float()
    adv_next = (origin + delta).clamp(0.0, 1.0)
    model_input = adv_next
    if mean is not None and std is not None:
        model_input = (adv_next - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    return adv_next, model_input.to(out_dtype, copy=True)
