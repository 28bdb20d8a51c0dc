"""Step 1a: untargeted projected gradient descent (Eq. 4 to 6), the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pbe_fast.config import PGDConfig
from pbe_fast.engine.precision import autocast
from pbe_fast.kernels.pgd_step import pgd_step_
from pbe_fast.kernels.philox import random_words
from pbe_fast.smoothness import smooth_step_, spread_matrices

# Philox's stream of the random starts, "PGD" and the number of the restart: no other operation draws the same numbers.
_STREAM = 0x50474400
# Likewise of the windows, "WIN".
_WINDOW_STREAM = 0x57494E00


def pgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: PGDConfig,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Adversarial copies of ``images``: the loss of their own labels maximised within the eps ball.

    This is the plain loop, on the model as it stands: put it in eval mode first. Its parameters get no gradients.
    `pbe_fast.attacker.PGD` gives the same images faster, and heeds ``restarts`` and ``early_stop``, too.

    Args:
        model: Returns (B, K) logits for float images in [0, 1].
        images: (B, C, H, W) float32 in [0, 1].
        labels: (B,) int64.
        config: Norm, radius, steps.
        dtype: Of the model's matrix products; the images stay in float32.
        seed: Of the random start and of the windows.
        image_ids: (B,) int64, what these are drawn by for each image; their positions if not given.

    Returns:
        (B, C, H, W) float32 in [0, 1], in the memory layout of ``images``.
    """
    ids = torch.arange(len(images), device=images.device) if image_ids is None else image_ids
    adversarial = random_start(images, ids, config, seed) if config.random_start else images.clone()
    windows = None if config.window is None else random_windows(images, ids, config.window, seed)
    spread = None if config.grid is None else spread_matrices(config.grid, images.shape, images.device)
    for _ in range(config.steps):
        gradient, _ = input_gradient(model, adversarial, labels, dtype=dtype)
        if spread is not None:
            smooth_step_(adversarial, gradient, images, spread, eps=config.eps, alpha=config.step_size)
            continue
        if windows is not None:
            gradient = gradient * windows
        pgd_step_(adversarial, gradient, images, eps=config.eps, alpha=config.step_size, norm=config.norm)
    return adversarial


def input_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Gradient of the summed cross-entropy with respect to the images; no loss value, no weight gradients.

    Args:
        model: Returns (B, K) logits.
        images: (B, C, H, W), float32 or what the model takes.
        labels: (B,) int64.
        dtype: Of the matrix products.

    Returns:
        The gradient, (B, C, H, W) in the dtype of the images, and the logits.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad(), autocast(images.device, dtype):
        logits = model(images)
    # The derivative of the cross-entropy with respect to the logits, softmax - onehot, starts the backward pass.
    start = torch.softmax(logits.detach().float(), dim=1)
    start.scatter_add_(1, labels[:, None], start.new_full((len(labels), 1), -1.0))
    (gradient,) = torch.autograd.grad(logits, images, start.to(logits.dtype))
    return gradient, logits.detach()


def random_start(
    images: Tensor, image_ids: Tensor, config: PGDConfig, seed: int | Tensor, restart: int | Tensor = 0
) -> Tensor:
    """A random point of the eps ball around each image: uniform in the box, or in the l2 ball.

    It depends on seed, image id, restart and the element's place, not on the batch, the layout or the device (in the l2
    ball, up to the rounding of logarithms and cosines).
    """
    size = images[0].numel() if len(images) else 0
    # Two words for two normals (Box and Muller, 1958), and a last one for the radius.
    words = random_words(image_ids, seed, _STREAM + restart, size if config.norm == "linf" else size + size % 2 + 1)
    # Centres of 2^23 equal intervals of (0, 1): exact in float32.
    uniform = ((words >> 9) * 2 + 1).float() * 2.0**-24
    if config.norm == "linf":
        noise = uniform * 2 - 1
    else:
        radius = (-2 * uniform[:, :-1:2].log()).sqrt()
        angle = uniform[:, 1:-1:2] * (2 * math.pi)
        direction = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)[:, :size]
        noise = uniform[:, -1:] ** (1 / max(size, 1)) * direction / direction.norm(dim=1, keepdim=True)
    start = torch.add(images, noise.view(images.shape), alpha=config.eps).clamp_(0, 1)
    if config.window is None:
        return start
    return torch.where(random_windows(images, image_ids, config.window, seed, restart), start, images)


def window_side(share: float, image_shape: Sequence[int]) -> int:
    """Pixels of a window's side; at least one."""
    return max(1, round(share * min(image_shape[-2:])))


def random_windows(
    images: Tensor, image_ids: Tensor, share: float, seed: int | Tensor, restart: int | Tensor = 0
) -> Tensor:
    """A random square of each image, where a patch may be: along each axis half of them touch a border.

    They depend on seed, image id and restart, as `random_start` does.

    Args:
        images: (B, C, H, W).
        image_ids: (B,) int64.
        share: Side of the square as a fraction of the image's shorter side.
        seed: 64 bits.
        restart: The number of the restart.

    Returns:
        (B, 1, H, W) bool.
    """
    side = window_side(share, images.shape[1:])
    words = random_words(image_ids, seed, _WINDOW_STREAM + restart, 2)
    inside = []
    for axis, size in enumerate(images.shape[2:]):
        places = size - side + 1
        # Twice as many starts as there are places: those before the first and after the last are at the borders.
        start = (words[:, axis] % (2 * places) - places // 2).clamp(0, places - 1)
        offset = torch.arange(size, device=images.device) - start[:, None]
        inside.append((offset >= 0) & (offset < side))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]
