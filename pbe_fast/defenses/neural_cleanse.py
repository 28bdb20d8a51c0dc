"""Neural Cleanse (Wang et al., IEEE S&P 2019): search a trigger for every label, unlearn those that are too small."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pbe_fast.baselines import NeuralCleanseConfig
from pbe_fast.data import ImageSet
from pbe_fast.defenses.base import Defense, Work
from pbe_fast.defenses.trigger_search import Triggers, search_triggers
from pbe_fast.models import check_differentiable

_MAX_PICTURES = 10
# Makes the median absolute deviation of normally distributed figures an estimate of their standard deviation.
_MAD_TO_SIGMA = 1.4826


class NeuralCleanse(Defense[NeuralCleanseConfig]):
    """Unlearns the triggers whose masks are much smaller than those of the other labels; without one does nothing."""

    method = "nc"

    def run(self, work: Work, config: NeuralCleanseConfig) -> None:
        """Search, look for outliers, unlearn."""
        check_differentiable(work.infected, work.clean.image_shape)
        with work.step("trigger search") as entry:
            found = search_triggers(
                work.infected, work.clean, config, generator=work.generator, dtype=work.dtype, progress=work.progress
            )
            entry |= {"images": len(work.clean), "rounds": max(found.rounds)}
        norms = found.norms()
        indices = anomaly_indices(norms)
        outliers = small_outliers(norms, config.outlier_index)
        for label, (norm, index) in enumerate(zip(norms.tolist(), indices.tolist(), strict=True)):
            work.history.append(
                {
                    "step": f"trigger of {work.clean.class_names[label]}",
                    "rounds": found.rounds[label],
                    "reached": bool(found.reached[label]),
                    "mask_norm": norm,
                    "anomaly_index": index,
                    "outlier": label in outliers,
                }
            )
        for label in norms.argsort(stable=True)[:_MAX_PICTURES].tolist():
            work.pictures[f"trigger_{label}"] = found.picture(label)
        if not outliers:
            work.history.append({"step": "unlearning", "finding": "no outlier: nothing done"})
            return
        stamped = stamp_some(work.clean, found, outliers, config.stamped, work.generator)
        work.fine_tune(
            stamped, config.finetune, epochs=config.epochs, min_updates=config.min_updates, name="unlearning"
        )
        named = ", ".join(f"{work.clean.class_names[k]} (anomaly index {indices[k]:.1f})" for k in outliers)
        work.history[-1]["finding"] = f"unlearned the trigger of {named}"


def anomaly_indices(norms: Tensor) -> Tensor:
    """|norm - median| / (1.4826 * median absolute deviation), (K,) float64; 0 where all norms are equal."""
    norms = norms.double()
    deviation = (norms - norms.quantile(0.5)).abs()
    return (deviation / (_MAD_TO_SIGMA * deviation.quantile(0.5))).nan_to_num(nan=0.0, posinf=math.inf)


def small_outliers(norms: Tensor, limit: float) -> list[int]:
    """Labels whose norm lies below the median with an anomaly index above ``limit``."""
    small = norms.double() < norms.double().quantile(0.5)
    return (small & (anomaly_indices(norms) > limit)).nonzero()[:, 0].tolist()


def stamp_some(
    data: ImageSet, triggers: Triggers, labels: list[int], share: float, generator: torch.Generator
) -> ImageSet:
    """A copy of ``data``, a random ``share`` (at least one image) with one of the triggers on it; labels stay true."""
    chosen = torch.randperm(len(data), generator=generator)[: max(1, round(share * len(data)))]
    which = torch.tensor(labels)[torch.randint(len(labels), (len(chosen),), generator=generator)]
    images = data.images.clone()
    for label in labels:
        ids = chosen[which == label].to(data.device)
        images[ids] = (triggers.stamp(data.floats(ids), label) * 255).round_().to(torch.uint8)
    return dataclasses.replace(data, images=images, name=f"{data.name} with recovered triggers")


neural_cleanse = NeuralCleanse()
