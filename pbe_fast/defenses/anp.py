"""Adversarial neuron pruning (Wu and Wang, NeurIPS 2021, arXiv:2110.14430): prune the neurons that a nudge turns."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pbe_fast.baselines import ANPConfig
from pbe_fast.data import ImageSet
from pbe_fast.data.augment import augment
from pbe_fast.defenses.base import Defense, Work
from pbe_fast.engine.copies import deep_copy
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress
from pbe_fast.engine.training import training_form
from pbe_fast.finetune import endless_batches
from pbe_fast.models import batch_norms

_MASK_MOMENTUM = 0.9


class ANP(Defense[ANPConfig]):
    """A neuron is a channel of a batch normalisation; pruning sets its weight to zero. Nothing else changes."""

    method = "anp"

    def run(self, work: Work, config: ANPConfig) -> None:
        """Learn the masks on one part of the clean set, choose the threshold on the other."""
        names = list(batch_norms(work.model))
        rest, held_out = work.hold_out(config.held_out)
        with work.step("masks") as entry:
            neurons = Neurons(copy.deepcopy(work.infected), names, work.dtype, rest.image_shape)
            masks = train_masks(neurons, rest, config, work.generator, show_progress=work.progress)
            entry |= {"images": len(rest), "updates": config.iterations}
        with work.step("pruning") as entry:
            before = work.accuracy(work.model, held_out)
            entry |= {"images": len(held_out), "held_out_acc_before": before, "held_out_acc": before}
            threshold = None
            for candidate in thresholds(config):
                pruned = deep_copy(work.model)
                prune(pruned, names, masks <= candidate)
                accuracy = work.accuracy(pruned, held_out)
                if accuracy < (1 - config.max_drop) * before:
                    break
                entry["held_out_acc"] = accuracy
                threshold, work.model = candidate, pruned
            count = 0 if threshold is None else int((masks <= threshold).sum())
            entry["finding"] = f"pruned {count} of {len(masks)} BN channels" + (
                ": no threshold keeps the accuracy" if threshold is None else f" at threshold {threshold:g}"
            )


class Neurons:
    """A network whose BN weights and biases are scaled channel by channel, all of them in one vector.

    Args:
        model: Frozen; put into training mode, as the authors do, so that batches are normalised by themselves.
        names: Its BN layers.
        dtype: Of the matrix products.
        image_shape: (C, H, W) of its input.
    """

    def __init__(self, model: nn.Module, names: list[str], dtype: torch.dtype, image_shape: tuple[int, ...]) -> None:
        self._model = training_form(model.train(), image_shape)
        # A model may hold layers that its forward pass does not call.
        self._used = {name for name, _ in self._model.named_parameters()}
        self._names = names
        self._dtype = dtype
        self._parameters = {key: p for name in names for key, p in _scaled_parameters(model, name)}
        self._sizes = [model.get_parameter(f"{name}.weight").numel() for name in names]
        self.count = sum(self._sizes)

    def loss(self, images: Tensor, labels: Tensor, scale: Tensor, bias_scale: Tensor) -> Tensor:
        """Cross-entropy with every BN weight times ``scale`` and bias times ``bias_scale``, (count,) each."""
        scales = zip(self._names, scale.split(self._sizes), bias_scale.split(self._sizes), strict=True)
        changed = {
            key: self._parameters[key] * factor
            for name, of_weight, of_bias in scales
            for key, factor in ((f"{name}.weight", of_weight), (f"{name}.bias", of_bias))
            if key in self._used
        }
        with autocast(images.device, self._dtype):
            logits: Tensor = functional_call(self._model, changed, (images,))
        return F.cross_entropy(logits.float(), labels)


def train_masks(
    neurons: Neurons, data: ImageSet, config: ANPConfig, generator: torch.Generator, *, show_progress: bool = False
) -> Tensor:
    """Masks that keep the loss low under the worst relative change of the neurons: (count,) in [0, 1]."""
    masks = torch.ones(neurons.count, dtype=torch.float32, device=data.device, requires_grad=True)
    optimizer = torch.optim.SGD([masks], lr=config.mask_lr, momentum=_MASK_MOMENTUM)
    batches = endless_batches(len(data), config.batch_size, generator, device=data.device)
    batches = itertools.islice(batches, config.iterations)
    for batch in progress(batches, total=config.iterations, desc="masks", enabled=show_progress):
        images, labels = to_input(augment(data.images[batch], config.augment, generator)), data.labels[batch]
        ones = torch.ones_like(masks)
        # Eq. 5: the clean loss, and that under the worst perturbation of weights and biases
        loss = config.clean_weight * neurons.loss(images, labels, masks, ones)
        if config.clean_weight < 1:
            change, bias_change = worst_change(neurons, images, labels, masks.detach(), config, generator)
            perturbed = neurons.loss(images, labels, masks + change, 1 + bias_change)
            loss = loss + (1 - config.clean_weight) * perturbed
        (masks.grad,) = torch.autograd.grad(loss, masks)
        optimizer.step()
        with torch.no_grad():
            masks.clamp_(0, 1)
    return masks.detach()


def worst_change(
    neurons: Neurons, images: Tensor, labels: Tensor, masks: Tensor, config: ANPConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Relative changes of the BN weights and biases that raise the loss (Eq. 3), each within ``perturbation``.

    Signed gradient steps from a random start in the box, and back into it.
    """
    eps = config.perturbation
    both = ((torch.rand(2, neurons.count, dtype=torch.float32, generator=generator) * 2 - 1) * eps).to(
        masks.device, non_blocking=True
    )
    for _ in range(config.perturbation_steps):
        both.requires_grad_(True)
        loss = neurons.loss(images, labels, masks + both[0], 1 + both[1])
        (gradient,) = torch.autograd.grad(loss, both)
        both = (both.detach() + gradient.sign() * eps / config.perturbation_steps).clamp_(-eps, eps)
    return both[0], both[1]


def thresholds(config: ANPConfig) -> list[float]:
    """0, ``threshold_step``, ... up to ``max_threshold``."""
    count = int(config.max_threshold / config.threshold_step + 1e-9)
    return [round(i * config.threshold_step, 10) for i in range(count + 1)]


def prune(model: nn.Module, names: list[str], pruned: Tensor) -> None:
    """Set the BN weights of the channels where ``pruned``, (count,) bool over all layers, is True to zero."""
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    with torch.no_grad():
        for weight, where in zip(weights, pruned.split([w.numel() for w in weights]), strict=True):
            weight[where] = 0


def _scaled_parameters(model: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{kind}", model.get_parameter(f"{name}.{kind}")) for kind in ("weight", "bias")]


anp = ANP()
