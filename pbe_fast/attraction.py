"""Where untargeted adversarial images end up: the paper's observation that they find the backdoor (Sec. 3.4.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pbe_fast.attacker import PGD
from pbe_fast.calibration import CONCENTRATION, Largest
from pbe_fast.config import PGDConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.forward import predict_logits, to_input
from pbe_fast.engine.progress import progress

_SAMPLE = 1000
_BATCH = 250
_HALVINGS = 6
_MOVED = 0.25
# One benign model in five has a label that gets as much, were its labels as uneven as those that the scan was
# calibrated on. Of ten labels that is 2.5 times the even share (on CIFAR-10 benign ones, and those of all-to-all
# attacks, got up to 2.2 times, targets from 3.3 on: docs/recipe.md), of three 1.8, of 200 five to seven times, by how
# many images moved.
_RARE = 0.2
_UNEVENNESS = CONCENTRATION["all_to_one", "most"]
# In larger windows benign models lead to a label or two as well (docs/recipe.md: 36 of 40 in a quarter of the side).
LARGEST_WINDOW = 0.125


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
    seed = int(torch.randint(2**62, (), generator=generator)) if pgd.draws else 0
    attack = PGD(model, pgd, image_shape=data.image_shape, batch_size=_BATCH, dtype=dtype, seed=seed, planned=len(data))
    batches = torch.arange(len(data), device=data.device).split(_BATCH)
    for ids in progress(batches, desc=desc, enabled=show_progress):
        labels = data.labels[ids]
        adversarial = attack(to_input(data.images[ids]), labels, ids)
        pixels = (adversarial * 255).round_().to(torch.uint8)
        reached = predict_logits(model, pixels, dtype=dtype).argmax(1)
        known = reached < k
        counts += torch.bincount((labels * k + reached)[known].cpu(), minlength=k * k)
    return counts.view(k, k)


def arrival_shares(counts: Tensor) -> Tensor:
    """How much of the other labels' misled images each label attracts, from (K, K) counts of `reached_labels`.

    Every other label's images together count as one, however many there are; labels without one are left out.

    Returns:
        (K,) float64. Were all destinations alike, each share would be 1 / (K - 1).
    """
    by_label, misled = _by_label(counts)
    others = misled[:, None] & ~torch.eye(len(counts), dtype=torch.bool)
    return (by_label * others).sum(0) / others.sum(0).clamp_min(1)


def shift_shares(counts: Tensor) -> Tensor:
    """How much of every label's misled images goes to the label s further on (y + s mod K), likewise.

    Returns:
        (K - 1,) float64, for s of 1 to K - 1; they sum to 1 where any image was misled.
    """
    by_label, misled = _by_label(counts)
    k = len(counts)
    labels = torch.arange(k)
    diagonals = [by_label[labels, (labels + s) % k].sum() for s in range(1, k)]
    return torch.stack(diagonals) / misled.sum().clamp_min(1)


def _by_label(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each label's misled images as shares of the labels reached, (K, K), and which labels have any, (K,)."""
    misled = (counts - torch.diag(counts.diagonal())).double()
    return misled / misled.sum(1, keepdim=True).clamp_min(1), misled.sum(1) > 0


def attack_counts(
    model: nn.Module,
    data: ImageSet,
    pgd: PGDConfig,
    *,
    patches: Sequence[PGDConfig] = (),
    generator: torch.Generator,
    dtype: torch.dtype,
    show_progress: bool = False,
) -> Tensor:
    """Where the untargeted attack leads, at two sizes of eps and in windows.

    For a benign model about uniform, says the paper, for an infected one the target label. Which attack shows it
    depends on the trigger. The way to a faint one (WaNet) is the shortest, and only the least eps that moves the images
    at all finds it; one that changes every pixel a good deal (Blend) takes the full eps; a patch (BadNets) is in no
    such ball, but in a window.

    Args:
        model: In eval mode, on the device of ``data``.
        data: A random thousand of it, which the model answers with their label, is attacked.
        pgd: The attack. Its eps is the larger one; the smaller is the least of eps / 2, ..., eps / 64 that moves a
            quarter of the images to another label.
        patches: Attacks on windows; those on more than an eighth of the side are left out. One that moves fewer than a
            quarter of the images shows nothing.
        generator: On the CPU.
        dtype: Of the matrix products.
        show_progress: Whether each of its attacks shows a bar where it lasts.

    Returns:
        (2 + windows, K, K) int64 on the CPU, for the smaller eps, the full one and the windows, as `reached_labels`
        counts; zeros where an attack shows nothing, or the model answers nothing rightly.
    """
    patches = [patch for patch in patches if patch.window is not None and patch.window <= LARGEST_WINDOW]
    sample = data.select(torch.randperm(len(data), generator=generator)[: 2 * _SAMPLE].to(data.device))
    # Not before: the whole set may be too large for the model's device.
    sample = sample.to(next(model.parameters()).device)
    right = predict_logits(model, sample.images, dtype=dtype).argmax(1) == sample.labels
    if not right.any():
        return torch.zeros(2 + len(patches), data.num_classes, data.num_classes, dtype=torch.int64)
    sample = sample.select(right.nonzero()[:_SAMPLE, 0])

    def attack(pgd: PGDConfig, where: str) -> Tensor:
        desc = f"attracting labels, {where}"
        return reached_labels(
            model, sample, pgd, generator=generator, dtype=dtype, desc=desc, show_progress=show_progress
        )

    def attack_within(eps: float) -> Tensor:
        scaled = dataclasses.replace(pgd, eps=eps, alpha=pgd.step_size * eps / pgd.eps)
        return attack(scaled, f"eps {eps * 255:.3g}/255")

    def moves_enough(counts: Tensor) -> bool:
        return bool(counts.sum() - counts.diagonal().sum() >= _MOVED * len(sample))

    full = attack_within(pgd.eps)
    for halvings in range(_HALVINGS, 0, -1):
        least = attack_within(pgd.eps / 2**halvings)
        if moves_enough(least):
            break
    in_windows = [attack(patch, f"windows of {patch.window:.3g}") for patch in patches]
    return torch.stack([least, full, *(counts * moves_enough(counts) for counts in in_windows)])


def even_shares(counts: Tensor) -> Tensor:
    """Of (K, K) counts, the labels' shares of the misclassified images; every label's images together count as one.

    Returns:
        (K,) float64 that sum to 1, or zeros where no image was misclassified.
    """
    by_label, _ = _by_label(counts)
    return by_label.sum(0) / by_label.sum().clamp_min(1)


def attracting_labels(counts: Tensor) -> Tensor:
    """Labels that the attack leads to.

    Args:
        counts: (levels, K, K), as of `attack_counts`.

    Returns:
        (K,) bool on the CPU: those that at any level get more than benign labels mostly do (of ten 2.5 times their
        even share, of 43 3.3 to 4 times); none of two or fewer. A level at which a shift of all labels (y to y + s)
        stands out more than any label does is that of an all-to-all backdoor, which leads to no label in particular.
    """
    k = counts.shape[-1]
    attracting = torch.zeros(k, dtype=torch.bool)
    for level in counts:
        shares, moved = even_shares(level), int(level.sum() - level.diagonal().sum())
        if k > 2 and moved > 0 and (k - 1) * shift_shares(level).max() <= k * shares.max():
            largest = Largest(float(shares.max()), moved, candidates=k, destinations=k)
            attracting |= shares >= largest.critical(_RARE, _UNEVENNESS)
    return attracting
