"""ACC, ASR and recovered accuracy of a model, and the average precision of a ranking (Sec. 4.1 and 4.4.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.forward import predict_logits
from pbe_fast.errors import InputError
from pbe_fast.models import check_module


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Fractions in [0, 1]; None where no trigger is known.

    Attributes:
        acc: Clean test images predicted as their class.
        asr: Triggered images predicted as the attacker's target, those whose true class is the target left out.
        asr_with_target: The same over all triggered images, as some papers count.
        recovered_acc: Triggered images (those of ``asr``) predicted as their true class.
    """

    acc: float
    asr: float | None = None
    asr_with_target: float | None = None
    recovered_acc: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def evaluate(
    model: nn.Module,
    test: Any,
    triggered: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> Metrics:
    """A model's accuracy and, where a triggered test set is given, how often the attacker succeeds.

    Args:
        model: Returns logits for float images in [0, 1]; on the device of the sets, or these on the CPU.
        test: Clean test images: an `ImageSet`, or anything else that `as_image_set` takes.
        triggered: Triggered test images, likewise, as `triggered_test_set` makes them: ``labels`` are the attacker's
            targets, ``true_labels`` the truth.
        dtype: Of the matrix products.
        show_progress: Whether to show bars.

    Raises:
        InputError: No model, sets that cannot be read, or ``triggered`` without ``true_labels``.
    """
    check_module(model)
    test = as_image_set(test, progress=show_progress)
    triggered = None if triggered is None else as_image_set(triggered, progress=show_progress)
    predicted = predict_logits(model, test.images, dtype=dtype, desc="accuracy", show_progress=show_progress).argmax(1)
    acc = _share(predicted == test.labels)
    if triggered is None:
        return Metrics(acc=acc)
    predicted = predict_logits(
        model, triggered.images, dtype=dtype, desc="attack success", show_progress=show_progress
    ).argmax(1)
    return Metrics(acc=acc, **attack_success(predicted, triggered))


def attack_success(predicted: Tensor, triggered: ImageSet) -> dict[str, float]:
    """``asr``, ``asr_with_target`` and ``recovered_acc`` of predicted labels (N,) for a triggered set."""
    if triggered.true_labels is None:
        raise InputError(
            "triggered test set without true labels",
            got=f"image set '{triggered.name}'",
            accepted="one whose labels are the attacker's targets and whose true_labels are the truth",
        )
    hit = predicted == triggered.labels
    counted = triggered.labels != triggered.true_labels
    return {
        "asr": _share(hit[counted]),
        "asr_with_target": _share(hit),
        "recovered_acc": _share((predicted == triggered.true_labels)[counted]),
    }


def average_precision(order: Tensor, positives: Tensor) -> float:
    """AP of a ranking: the mean, over the positives, of the precision at each one's place.

    Args:
        order: (N,) int64, indices from the likeliest positive to the least likely.
        positives: (N,) bool.

    Returns:
        In [0, 1]; a random order gives about the share of positives. NaN if there are none.
    """
    found = positives[order].double()
    precision = found.cumsum(0) / torch.arange(1, len(found) + 1, device=found.device)
    return float((precision * found).sum() / found.sum())


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
