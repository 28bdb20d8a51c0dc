"""Step 1a: untargeted projected gradient descent (Eq. 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbe_fast.config import PGDConfig
from pbe_fast.engine.precision import autocast
from pbe_fast.kernels.pgd_step import pgd_step_


def pgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: PGDConfig,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Adversarial copies of ``images``: the loss of their own labels maximised within the eps ball.

    The model is used as it stands: put it in eval mode first. Its parameters get no gradients.

    Args:
        model: Returns (B, K) logits for float images in [0, 1].
        images: (B, C, H, W) float32 in [0, 1].
        labels: (B,) int64.
        config: Norm, radius, steps.
        dtype: Of the model's matrix products; the images stay in float32.
        generator: On the CPU, for the random start.

    Returns:
        (B, C, H, W) float32 in [0, 1], in the memory layout of ``images``.
    """
    adversarial = random_start(images, config, generator) if config.random_start else images.clone()
    for _ in range(config.steps):
        gradient = input_gradient(model, adversarial, labels, dtype=dtype)
        pgd_step_(adversarial, gradient, images, eps=config.eps, alpha=config.step_size, norm=config.norm)
    return adversarial


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradient of the summed cross-entropy with respect to the images; no loss value, no weight gradients.

    Args:
        model: Returns (B, K) logits.
        images: (B, C, H, W) float32.
        labels: (B,) int64.
        dtype: Of the matrix products.

    Returns:
        (B, C, H, W) float32.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad(), autocast(images.device, dtype):
        logits = model(images)
    # The derivative of the cross-entropy with respect to the logits, softmax - onehot, starts the backward pass.
    start = torch.softmax(logits.detach().float(), dim=1)
    start.scatter_add_(1, labels[:, None], start.new_full((len(labels), 1), -1.0))
    (gradient,) = torch.autograd.grad(logits, images, start.to(logits.dtype))
    return gradient


def random_start(images: Tensor, config: PGDConfig, generator: torch.Generator | None) -> Tensor:
    """A random point of the eps ball around each image: uniform in the box, or in the l2 ball."""
    if config.norm == "linf":
        noise = torch.rand(images.shape, generator=generator).to(images.device) * 2 - 1
    else:
        direction = torch.randn(images.shape, generator=generator).flatten(1)
        radius = torch.rand(len(images), 1, generator=generator) ** (1 / direction.shape[1])
        noise = (radius * direction / direction.norm(dim=1, keepdim=True)).view(images.shape).to(images.device)
    return torch.add(images, noise, alpha=config.eps).clamp_(0, 1)
