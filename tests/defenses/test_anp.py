from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pbe_fast.baselines import ANPConfig
from pbe_fast.data import split
from pbe_fast.defenses import anp
from pbe_fast.defenses.anp import Neurons, prune, thresholds, train_masks, worst_change
from pbe_fast.engine.copies import frozen_copy
from pbe_fast.engine.forward import predict_logits, to_input
from pbe_fast.errors import InputError

NAMES = ["net.bn1", "net.bn2", "net.bn3"]
COUNT = 8 + 16 + 16
CONFIG = ANPConfig(iterations=30, batch_size=64, max_drop=0.5)


@pytest.fixture
def neurons(infected: Any) -> Neurons:
    return Neurons(frozen_copy(infected.model, torch.device("cpu")), NAMES, torch.float32, infected.clean.image_shape)


def batch(infected: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return to_input(infected.clean.images[:40]), infected.clean.labels[:40]


def test_the_loss_is_that_of_a_network_with_scaled_bn(infected: Any, neurons: Neurons) -> None:
    torch.manual_seed(0)
    scale, bias_scale = torch.rand(COUNT), torch.rand(COUNT)
    scaled = copy.deepcopy(infected.model).train()
    with torch.no_grad():
        for name, a, b in zip(NAMES, scale.split([8, 16, 16]), bias_scale.split([8, 16, 16]), strict=True):
            scaled.get_submodule(name).weight *= a
            scaled.get_submodule(name).bias *= b
    images, labels = batch(infected)
    assert neurons.count == COUNT
    torch.testing.assert_close(neurons.loss(images, labels, scale, bias_scale), F.cross_entropy(scaled(images), labels))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_worst_change_stays_in_its_box_and_is_worse(infected: Any, neurons: Neurons, steps: int) -> None:
    images, labels = batch(infected)
    masks = torch.ones(COUNT)
    config = ANPConfig(perturbation=0.4, perturbation_steps=steps)
    both = worst_change(neurons, images, labels, masks, config, torch.Generator().manual_seed(0))
    start = (torch.rand(2, COUNT, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 0.4
    for change in both:
        assert change.shape == (COUNT,) and change.abs().max() <= 0.4 + 1e-6
    before = neurons.loss(images, labels, masks + start[0], 1 + start[1])
    assert neurons.loss(images, labels, masks + both[0], 1 + both[1]) > before + 0.1


def test_one_step_against_its_formula(infected: Any, neurons: Neurons) -> None:
    images, labels = batch(infected)
    masks = torch.ones(COUNT)
    found = worst_change(neurons, images, labels, masks, ANPConfig(), torch.Generator().manual_seed(3))
    start = ((torch.rand(2, COUNT, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 0.4).requires_grad_(True)
    neurons.loss(images, labels, masks + start[0], 1 + start[1]).backward()
    assert start.grad is not None
    torch.testing.assert_close(torch.stack(found), (start.detach() + 0.4 * start.grad.sign()).clamp(-0.4, 0.4))


def test_masks_lie_in_the_unit_interval_and_some_are_low(infected: Any, neurons: Neurons) -> None:
    masks = train_masks(neurons, infected.clean, CONFIG, torch.Generator().manual_seed(0))
    assert masks.shape == (COUNT,) and 0 <= masks.min() < 0.5 < masks.max() <= 1


def test_without_a_perturbed_loss_the_first_step_is_plain_sgd(infected: Any, neurons: Neurons) -> None:
    config = ANPConfig(clean_weight=1.0, iterations=1, mask_lr=0.2, augment="none", batch_size=140)
    masks = train_masks(neurons, infected.clean, config, torch.Generator().manual_seed(0))
    ones = torch.ones(COUNT, requires_grad=True)
    neurons.loss(to_input(infected.clean.images), infected.clean.labels, ones, torch.ones(COUNT)).backward()
    assert ones.grad is not None
    torch.testing.assert_close(masks, (1 - 0.2 * ones.grad).clamp(0, 1), atol=1e-6, rtol=1e-4)


def test_the_thresholds() -> None:
    assert thresholds(ANPConfig()) == [round(0.05 * i, 2) for i in range(19)]
    assert thresholds(ANPConfig(max_threshold=0.35, threshold_step=0.1)) == [0.0, 0.1, 0.2, 0.3]


def test_pruning_sets_bn_weights_to_zero_and_nothing_else(infected: Any) -> None:
    model = copy.deepcopy(infected.model)
    where = torch.zeros(COUNT, dtype=torch.bool)
    where[[0, 9, 39]] = True
    prune(model, NAMES, where)
    changed = {"net.bn1.weight": [0], "net.bn2.weight": [1], "net.bn3.weight": [15]}
    for name, value in model.state_dict().items():
        expected = infected.model.state_dict()[name].clone()
        for channel in changed.get(name, []):
            expected[channel] = 0
        assert torch.equal(value, expected), name


def test_held_out_clean_accuracy_alone_sets_the_threshold(infected: Any) -> None:
    result = anp(infected.model, infected.clean, config=CONFIG, device="cpu", precision="fp32", progress=False)
    weights = torch.cat([result.model.get_parameter(f"{name}.weight") for name in NAMES])
    count = int((weights == 0).sum())
    assert 0 < count < COUNT
    entry = result.history[1]
    assert entry["finding"].startswith(f"pruned {count} of {COUNT} BN channels at threshold 0.")
    held_out, rest = split(infected.clean, 0.2, seed=0)
    assert (result.history[0]["images"], entry["images"]) == (len(rest), len(held_out)) == (112, 28)
    for model, key in ((infected.model, "held_out_acc_before"), (result.model, "held_out_acc")):
        hits = predict_logits(model, held_out.images).argmax(1) == held_out.labels
        assert entry[key] == float(hits.double().mean())
    assert entry["held_out_acc"] >= 0.5 * entry["held_out_acc_before"]
    before = infected.model.state_dict()
    for name, value in result.model.state_dict().items():
        kept = value != 0 if name.removesuffix(".weight") in NAMES else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept]), name


def test_a_network_without_batch_normalisation(infected: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(784, 10))
    with pytest.raises(InputError, match="model without batch normalisation; got Sequential"):
        anp(plain, infected.clean, device="cpu", progress=False)
