"""Where untargeted adversarial images end up: the paper's observation that they find the backdoor (Sec. 3.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbe_fast.config import PGDConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.forward import predict_logits, to_input
from pbe_fast.engine.progress import progress
from pbe_fast.pgd import pgd_attack

_SAMPLE = 1000
_BATCH = 250


def reached_labels(
    model: nn.Module,
    data: ImageSet,
    pgd: PGDConfig,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    desc: str = "attacking",
    show_progress: bool = False,
) -> Tensor:
    """How many images of each label an untargeted attack leads to each label (the paper's Fig. 1 and 4, as counts).

    The adversarial images are rounded to uint8 before the model sees them: what is counted could be stored as a file.

    Args:
        model: In eval mode, on the device of ``data``.
        data: Every image is attacked once.
        pgd: The attack.
        generator: On the CPU, for random starts.
        dtype: Of the matrix products.
        desc: Text of the progress bar.
        show_progress: Whether there is one.

    Returns:
        (K, K) int64 on the CPU, row: the label of the image, column: the one reached; the diagonal holds the images
        that withstood. Images led to a logit that stands for no class of the data are left out.
    """
    k = data.num_classes
    counts = torch.zeros(k * k, dtype=torch.int64)
    batches = torch.arange(len(data), device=data.device).split(_BATCH)
    for ids in progress(batches, desc=desc, enabled=show_progress):
        labels = data.labels[ids]
        adversarial = pgd_attack(model, to_input(data.images[ids]), labels, pgd, dtype=dtype, generator=generator)
        pixels = (adversarial * 255).round_().to(torch.uint8)
        reached = predict_logits(model, pixels, dtype=dtype).argmax(1)
        known = reached < k
        counts += torch.bincount((labels * k + reached)[known].cpu(), minlength=k * k)
    return counts.view(k, k)


def label_shares(counts: Tensor) -> Tensor:
    """The labels' shares of the misclassified images in (K, K) counts: (K,) float64 that sums to 1, or zeros."""
    reached = counts.sum(0) - counts.diagonal()
    return reached.double() / reached.sum().clamp_min(1)


def attack_shares(
    model: nn.Module, data: ImageSet, pgd: PGDConfig, *, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Where the untargeted attack leads: the predicted labels of the adversarial images that are misclassified.

    For a benign model about uniform, says the paper, for an infected one the target label.

    Args:
        model: In eval mode, on the device of ``data``.
        data: A random thousand of it is attacked.
        pgd: The attack.
        generator: On the CPU.
        dtype: Of the matrix products.

    Returns:
        (K,) float64 on the CPU, summing to 1, or zeros if no image was misclassified. Logits that stand for no class of
        the data are left out.
    """
    sample = torch.randperm(len(data), generator=generator)[:_SAMPLE].to(data.device)
    return label_shares(reached_labels(model, data.select(sample), pgd, generator=generator, dtype=dtype))


def attracting_labels(shares: Tensor) -> Tensor:
    """(K,) bool: labels that attract more than twice their even share of adversarial images; none of two or fewer."""
    return shares > 2 / len(shares)
