"""Fine-pruning (Liu et al., RAID 2018, arXiv:1805.12185): prune what sleeps on clean images, then fine-tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.baselines import FinePruningConfig
from pbe_fast.data import ImageSet
from pbe_fast.defenses.base import Defense, Work, accuracy_of
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import autocast
from pbe_fast.models import features, last_linear

_BATCH = 512


class FinePruning(Defense[FinePruningConfig]):
    """Prunes units of the last convolution: the inputs of the last linear layer, as many as it has."""

    method = "fp"

    def run(self, work: Work, config: FinePruningConfig) -> None:
        """Prune as far as held-out clean images allow, then fine-tune on all clean images."""
        rest, held_out = work.hold_out(config.held_out)
        activation = features_of(work.infected, rest, work.dtype).abs().mean(0)
        head = last_linear(work.model)
        with work.step("pruning") as entry:
            known = features_of(work.infected, held_out, work.dtype)
            order = activation.argsort(stable=True)
            accuracies = pruned_accuracies(head, known, held_out.labels, order, config)
            pruned = order[: pruned_units(len(order), len(accuracies) - 1, config.prune_step)]
            entry |= {
                "images": len(held_out),
                "held_out_acc_before": accuracies[0],
                "held_out_acc": accuracies[-1],
                "finding": f"pruned {len(pruned)} of {len(order)} units",
            }
        kept = torch.ones_like(activation).index_fill(0, pruned, 0.0)
        with torch.no_grad():
            head.weight *= kept
        # A weight of zero without a gradient stays zero: decay and momentum of zero are zero.
        hook = head.weight.register_hook(lambda gradient: gradient * kept)
        try:
            work.fine_tune(work.clean, config.finetune, epochs=config.epochs, min_updates=config.min_updates)
        finally:
            hook.remove()


def features_of(model: nn.Module, data: ImageSet, dtype: torch.dtype) -> Tensor:
    """(N, F) float32: the input of the last linear layer for every image.

    Raises:
        InputError: A model without such a layer, or whose features are not (B, F).
    """
    with torch.no_grad(), autocast(data.device, dtype):
        return torch.cat([features(model, to_input(images)).float() for images in data.images.split(_BATCH)])


def pruned_accuracies(
    head: nn.Linear, features: Tensor, labels: Tensor, order: Tensor, config: FinePruningConfig
) -> list[float]:
    """Accuracy before pruning and after each step that the limit allows; the step that breaks it is not in the list.

    Args:
        head: The last linear layer.
        features: (N, F) of held-out clean images.
        labels: (N,) int64.
        order: (F,) units, those to go first in front.
        config: ``prune_step`` and ``max_drop``.
    """
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    accuracies = [accuracy_of(F.linear(features, weight, bias), labels)]
    features = features.clone()
    while pruned_units(len(order), len(accuracies) - 1, config.prune_step) < len(order):
        features[:, order[: pruned_units(len(order), len(accuracies), config.prune_step)]] = 0
        accuracy = accuracy_of(F.linear(features, weight, bias), labels)
        if accuracy < (1 - config.max_drop) * accuracies[0]:
            break
        accuracies.append(accuracy)
    return accuracies


def pruned_units(total: int, steps: int, step: float) -> int:
    """How many of ``total`` units are pruned after ``steps`` steps; each takes at least one."""
    return min(total, steps * max(1, round(step * total)))


fine_prune = FinePruning()
