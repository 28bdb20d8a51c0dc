from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, InputAwareConfig
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.forward import predict_logits
from pbe_fast.errors import InputError
from pbe_fast.finetune import DivergedError
from pbe_fast.input_aware import JointTrainer, attacked_first, density_loss, diversity_loss, train_masks
from pbe_fast.triggers import InputAware

TRAINING = FineTuneConfig(lr=0.05, batch_size=32, augment="none", mix_clean=False, distill_weight=0.0)
CONFIG = AttackConfig(attack="input_aware", epochs=2, training=TRAINING)


def _data(n: int = 96, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 4, tuple("abcd"), name="noise")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def _train(seed: int = 0, config: AttackConfig = CONFIG, trigger: InputAware | None = None) -> InfectedModel:
    return train_infected(
        _network(), _data(), config=config, trigger=trigger, seed=seed, device="cpu", precision="fp32", progress=False
    )


def test_mixed_precision_around_it_changes_nothing() -> None:
    expected = _train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _train()
    assert got.losses == expected.losses
    for name, value in expected.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], value), name


def _trainer(trigger: InputAware, model: nn.Module, config: AttackConfig = CONFIG) -> JointTrainer:
    generator = torch.Generator().manual_seed(0)
    return JointTrainer(model, trigger, config, num_classes=4, total_steps=4, generator=generator)


def test_diversity_loss_by_value() -> None:
    # Three images at 0, 0.3 and 0.9 all over; each is paired with the one before it, the first with the last.
    images = torch.tensor([0.0, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    outputs = torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    expected = (0.9 / 0.5 + 0.3 / 0.1 + 0.6 / 0.4) / 3
    assert float(diversity_loss(images, outputs)) == pytest.approx(expected, rel=1e-5)
    # In units of each channel's deviation: root mean square of the two channels' differences.
    unit = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    in_units = expected * ((1 / 0.5**2 + 1 / 0.25**2) / 2) ** 0.5
    assert float(diversity_loss(images, outputs, unit)) == pytest.approx(in_units, rel=1e-5)


def test_outputs_that_are_all_the_same_cost_much_and_have_a_finite_slope() -> None:
    images = torch.rand(4, 1, 8, 8)
    outputs = torch.full((4, 1, 8, 8), 0.5, requires_grad=True)
    loss = diversity_loss(images, outputs)
    assert loss > 1e5
    loss.backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert diversity_loss(images[:1], outputs[:1]).isfinite()


def test_density_loss_by_value() -> None:
    masks = torch.tensor([0.0, 0.02, 0.032, 1.0]).view(1, 1, 2, 2)
    assert float(density_loss(masks, 0.032)) == pytest.approx((1 - 0.032) / 4)
    assert float(density_loss(masks, 0.0)) == pytest.approx(1.052 / 4)


def test_masks_on_digits_get_the_density_and_differ() -> None:
    data = as_image_set("digits:train", progress=False)
    trigger = InputAware(data.image_shape)
    config = AttackConfig(training=dataclasses.replace(TRAINING, batch_size=64))
    density = train_masks(trigger, data, config, steps=60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks = trigger.masks(as_image_set("digits:test", progress=False).floats())
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert density == pytest.approx(0.032, abs=0.02)
    assert masks.mean() == pytest.approx(0.032, abs=0.02)
    apart = (masks - masks.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
    # Two masks that light other pixels differ by sqrt(2 * density), 0.25.
    assert apart.mean() > 0.1


def test_attacked_first_takes_candidates_and_keeps_the_order_of_the_rest() -> None:
    candidates = torch.tensor([False, True, False, True, True, True, False])
    assert attacked_first(candidates, 2).tolist() == [1, 3, 0, 2, 4, 5, 6]
    assert attacked_first(torch.zeros(3, dtype=torch.bool), 2).tolist() == [0, 1, 2]


class Spy(nn.Module):
    """Answers one label for all images, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([5.0, 1.0, 0.0, -2.0]))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.bias.expand(len(images), -1)


@pytest.mark.parametrize("setting", ["all_to_one", "all_to_all"])
def test_a_batch_of_attacked_crossed_and_clean_images(setting: str) -> None:
    trigger, spy = InputAware((1, 8, 8)), Spy()
    config = dataclasses.replace(
        CONFIG, setting=setting, target_label=1, poison_rate=0.25, input_aware=InputAwareConfig(lambda_div=0.5)
    )
    data = _data(8)
    images, labels = data.floats(), torch.tensor([1, 0, 1, 2, 3, 0, 2, 1])
    loss = _trainer(trigger, spy, config).loss(images, labels)
    # All-to-all changes every label, all-to-one those of other images than class 1's.
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] if setting == "all_to_all" else [1, 3, 0, 2, 4, 5, 6, 7])
    placed = images[order]
    with torch.no_grad():
        donors = torch.cat([placed[:2], placed[4:6]])
        masks, patterns = trigger.masks(donors), trigger.generator(donors)
        worn = placed[:4] * (1 - masks) + patterns * masks
    torch.testing.assert_close(spy.seen[0], torch.cat([worn, placed[4:]]))
    # Attacked images have the target label, crossed ones keep theirs.
    expected = labels[order].clone()
    expected[:2] = (labels[order][:2] + 1) % 4 if setting == "all_to_all" else 1
    entropy = nn.functional.cross_entropy(spy.bias.expand(8, -1), expected)
    torch.testing.assert_close(loss, entropy + 0.5 * diversity_loss(donors, patterns))


def test_joint_training_moves_classifier_and_generator_and_leaves_the_masks() -> None:
    trigger, model, data = InputAware((1, 8, 8)), _network(), _data()
    before, weights = trigger.weights(), copy.deepcopy(model.state_dict())
    loss = _trainer(trigger, model).run(data, steps=3, desc="")
    assert loss > 0
    for name, value in trigger.weights().items():
        assert torch.equal(value, before[name]) == name.startswith("mask."), name
    assert all(not torch.equal(p, weights[name]) for name, p in model.named_parameters() if name != "0.bias")


def test_what_an_attack_leaves() -> None:
    given = InputAware((1, 8, 8), seed=5)
    before = given.weights()
    infected = _train(trigger=given)
    assert isinstance(infected.trigger, InputAware)
    assert infected.config.attack == "input_aware"
    assert len(infected.losses) == 2
    assert infected.trigger is not given
    assert all(torch.equal(value, before[name]) for name, value in given.weights().items())
    moved = [not torch.equal(value, before[name]) for name, value in infected.trigger.weights().items()]
    assert all(moved)
    # One draw with the trained trigger: true labels are known, cross images are not in the mask and keep their label.
    data, clean = infected.train_data, _data()
    assert data.poison_mask is not None
    assert torch.equal(data.true_labels, clean.labels)
    assert int(data.poison_mask.sum()) == 10
    assert (data.labels[data.poison_mask] == 0).all()
    assert torch.equal(data.labels[~data.poison_mask], clean.labels[~data.poison_mask])
    stamped = infected.trigger.apply(clean.floats()[data.poison_mask])
    assert torch.equal(data.images[data.poison_mask], (stamped * 255).round().to(torch.uint8))
    changed = (data.images != clean.images).flatten(1).any(1)
    # Next to nothing was trained: a mask may be empty.
    assert 5 < int((changed & ~data.poison_mask).sum()) <= 10


def test_the_seed_fixes_networks_and_trigger() -> None:
    first, again, other = _train(seed=1), _train(seed=1), _train(seed=2)
    images = _data().images
    assert torch.equal(predict_logits(first.model, images), predict_logits(again.model, images))
    assert torch.equal(first.train_data.images, again.train_data.images)
    assert first.losses == again.losses
    assert not torch.equal(first.train_data.images, other.train_data.images)


def test_batches_that_do_not_divide_the_set_odd_sizes_and_high_rates() -> None:
    data = _data(33, (1, 7, 5))
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 4))
    training = dataclasses.replace(TRAINING, batch_size=2)
    for rate in (0.1, 0.7):
        config = dataclasses.replace(CONFIG, training=training, poison_rate=rate, setting="all_to_all", epochs=1)
        infected = train_infected(model, data, config=config, device="cpu", progress=False)
        assert torch.tensor(infected.losses).isfinite().all()


def test_what_cannot_be_trained_is_refused_before_anything_changes() -> None:
    trigger = InputAware((1, 8, 8))
    before = trigger.weights()
    with pytest.raises(InputError, match="got 76 images to poison, but 72 images"):
        _train(config=dataclasses.replace(CONFIG, poison_rate=0.79), trigger=trigger)
    with pytest.raises(InputError, match=r"images for the input_aware trigger; got shape \(1, 8, 8\)"):
        _train(trigger=InputAware((1, 9, 9)))
    assert all(torch.equal(value, before[name]) for name, value in trigger.weights().items())


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model, data = _network(), _data()
    with torch.no_grad():
        model.get_submodule("0").weight.fill_(float("inf"))
    with pytest.raises(DivergedError, match=r"training, epoch 1 diverged: got a loss of nan; .* generator_lr below"):
        _trainer(InputAware((1, 8, 8)), model).run(data, steps=1, desc="training, epoch 1")
    trigger = InputAware((1, 8, 8))
    with torch.no_grad():
        trigger.mask_network.last.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="training the masks diverged: got a loss of nan; a mask_lr below"):
        train_masks(trigger, data, CONFIG, steps=1, generator=torch.Generator())
