from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tuners import ATTACK, few_images, first_batch, network, plain, tuner

from pbe_fast.config import PGDConfig, WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.finetune import (
    DivergedError,
    FineTuner,
    learning_rate_factor,
)
from pbe_fast.pgd import pgd_attack


@pytest.fixture
def data() -> ImageSet:
    return few_images()


def test_the_learning_rate_is_a_half_cosine() -> None:
    factors = [learning_rate_factor(step, 10, 0.0) for step in range(10)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)


def test_the_learning_rate_rises_over_the_warm_up() -> None:
    factors = [learning_rate_factor(step, 20, 0.25) for step in range(20)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    expected = [c * min(1, (step + 1) / 5) for step, c in enumerate(cosine)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_equal_a_literal_loop(data: ImageSet, nesterov: bool) -> None:
    config = plain(momentum=0.8, weight_decay=0.01, nesterov=nesterov, warmup=0.4)
    steps = 7  # two passes of three batches, and one batch more
    model, expected = network(), network()
    got_loss = tuner(model, config, steps).run(data, steps=steps)

    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(21, generator=generator).tensor_split(3) for _ in range(3)]
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    loss_sum, seen = 0.0, 0
    expected.train()
    for step, batch in enumerate([b for order in orders for b in order][:steps]):
        loss = F.cross_entropy(expected(data.images[batch].float() / 255), data.labels[batch])
        loss_sum, seen = loss_sum + loss.item() * len(batch), seen + len(batch)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        rate = 0.05 * min(1, (step + 1) / 2.8) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for p, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                g = g + 0.01 * p
                v.copy_(g if step == 0 else 0.8 * v + g)
                p.sub_(rate * (g + 0.8 * v if nesterov else v))
    assert got_loss == pytest.approx(loss_sum / seen, rel=1e-4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_schedule_goes_on_over_several_runs(data: ImageSet) -> None:
    whole, parts = network(), network()
    tuner(whole, plain(), 6).run(data, steps=6)
    one = tuner(parts, plain(), 6)
    one.run(data, steps=3)
    one.run(data, steps=3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def _fresh_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(copy.deepcopy(model).train()(images), labels)


@pytest.mark.parametrize("mix", [False, True])
def test_the_adversarial_loss_is_on_images_attacked_in_eval_mode(data: ImageSet, mix: bool) -> None:
    model = network()
    with torch.no_grad():  # so that the statistics kept from training differ from those of a batch
        model.get_buffer("1.running_mean").fill_(0.3)
        model.get_buffer("1.running_var").fill_(4.0)
    batch = first_batch(21, 8)
    images, labels = data.floats(batch), data.labels[batch]
    adversarial = pgd_attack(copy.deepcopy(model).eval(), images, labels, ATTACK)
    if mix:
        expected = _fresh_loss(model, torch.cat([adversarial, images]), labels.repeat(2))
    else:
        expected = _fresh_loss(model, adversarial, labels)
    got = tuner(model, plain(mix_clean=mix), 1).run(data, steps=1, attack=ATTACK)
    assert got == pytest.approx(expected.item(), rel=1e-4)


def test_several_attacks_take_turns(data: ImageSet) -> None:
    one = data.select(torch.arange(8))
    attacks = tuple(PGDConfig(eps=eps, steps=1) for eps in (0.3, 0.1, 0.02))
    seen: list[PGDConfig] = []
    whole = tuner(network(), plain(lr=1e-9, mix_clean=False), 4)
    attacker_for = whole._attacker_for

    def watched(attack: PGDConfig, *args: Any) -> Any:
        seen.append(attack)
        return attacker_for(attack, *args)

    whole._attacker_for = watched  # type: ignore[method-assign]
    mean = whole.run(one, steps=4, attack=attacks)
    assert seen == [*attacks, attacks[0]]
    # The weights hardly move, so that each update has the loss of a model that is attacked alone.
    alone = [
        tuner(network(), plain(lr=1e-9, mix_clean=False), 1).run(one, steps=1, attack=attack) for attack in attacks
    ]
    assert alone[0] > alone[1] > alone[2]
    assert mean == pytest.approx((2 * alone[0] + alone[1] + alone[2]) / 4, rel=1e-2)


def test_windows_and_waves_take_turns_and_are_drawn_anew_in_every_update(
    data: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Tensor] = []
    loss = FineTuner._adversarial_loss

    def watched(self: FineTuner, adversarial: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        trained.append(adversarial - images)
        return loss(self, adversarial, images, labels)

    monkeypatch.setattr(FineTuner, "_adversarial_loss", watched)
    # A batch of all images, in another order each time.
    config = plain(batch_size=len(data), mix_clean=False)
    turns = (PGDConfig(eps=1.0, alpha=0.5, steps=2, window=0.25), WaveConfig(amplitude=0.1))
    tuner(network(), config, 4).run(data, steps=4, attack=turns)
    side = round(0.25 * min(data.image_shape[1:]))
    for patched in trained[0::2]:
        touched = (patched != 0).any(1)
        assert 0 < touched.sum((1, 2)).max() <= side * side
        assert touched.any(2).sum(1).max() <= side and touched.any(1).sum(1).max() <= side
    for waved in trained[1::2]:
        assert 0.05 < waved.abs().max() <= 0.1 + 1e-6
        assert (waved != 0).double().mean() > 0.9
    for first, second in (trained[0::2], trained[1::2]):
        # Nor the same for another order of the images.
        changed = [{tuple(image.flatten().tolist()) for image in batch} for batch in (first, second)]
        assert not changed[0] & changed[1]
    again = list(trained)
    trained.clear()
    tuner(network(), config, 4).run(data, steps=4, attack=turns)
    assert all(torch.equal(a, b) for a, b in zip(again, trained, strict=True))


@pytest.mark.parametrize("mix", [False, True])
def test_only_the_updates_touch_the_statistics_of_batch_normalisation(data: ImageSet, mix: bool) -> None:
    model = network()
    tuner(model, plain(mix_clean=mix), 5).run(data, steps=5, attack=ATTACK)
    assert int(model.get_buffer("1.num_batches_tracked")) == 5


def test_fine_tuning_learns_and_adversarial_fine_tuning_makes_robust(data: ImageSet) -> None:
    def loss_under_attack(model: nn.Module) -> float:
        attacked = pgd_attack(model.eval(), data.floats(), data.labels, ATTACK)
        return F.cross_entropy(model(attacked), data.labels).item()

    clean, robust = network(), network()
    tuner(clean, plain(), 40).run(data, steps=40)
    tuner(robust, plain(), 40).run(data, steps=40, attack=ATTACK)
    assert F.cross_entropy(clean.eval()(data.floats()), data.labels).item() < 0.5
    assert loss_under_attack(robust) < 0.8 * loss_under_attack(clean)


def test_bf16_keeps_weights_and_statistics_in_float32(data: ImageSet) -> None:
    exact, mixed = network(), network()
    first = tuner(exact, plain(), 3).run(data, steps=3, attack=ATTACK)
    second = tuner(mixed, plain(), 3, dtype=torch.bfloat16).run(data, steps=3, attack=ATTACK)
    assert all(v.dtype == torch.float32 for k, v in mixed.state_dict().items() if "tracked" not in k)
    assert second == pytest.approx(first, rel=0.05)
    assert second != first


class Casting(nn.Module):
    """A model with an autocast of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = self.net(images)
        return logits


@pytest.mark.parametrize("make", [network, Casting])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_around_it_changes_nothing(
    data: ImageSet, dtype: torch.dtype, make: Callable[[], nn.Module]
) -> None:
    losses, weights = [], []
    for around in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model = make()
        one = tuner(model, plain(distill_weight=0.5), 12, dtype=dtype, teacher=network(seed=1).eval())
        with around:
            losses.append([one.run(data, steps=3, attack=attack) for attack in (ATTACK, None, ATTACK, None)])
        weights.append(model.state_dict())
    assert losses[0] == losses[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_augmentation_is_used(data: ImageSet) -> None:
    losses = [tuner(network(), plain(augment=kind), 3).run(data, steps=3) for kind in ("none", "crop")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("attack", [None, ATTACK])
def test_images_sent_batch_by_batch_train_like_resident_ones(data: ImageSet, attack: PGDConfig | None) -> None:
    resident, streamed = network(), network()
    config = plain(augment="crop+flip")
    among = torch.tensor([20, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    losses = [
        tuner(model, config, 9).run(data, steps=9, attack=attack, among=among, streamed=model is streamed)
        for model in (resident, streamed)
    ]
    assert losses[0] == losses[1]
    for a, b in zip(resident.state_dict().values(), streamed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_among_some_images_is_training_on_a_set_of_them(data: ImageSet) -> None:
    chosen = torch.tensor([20, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    selected, among = network(), network()
    tuner(selected, plain(augment="crop"), 5).run(data.select(chosen), steps=5)
    tuner(among, plain(augment="crop"), 5).run(data, steps=5, among=chosen)
    for a, b in zip(selected.state_dict().values(), among.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_set_that_changes_between_runs_is_seen(data: ImageSet) -> None:
    other = ImageSet(255 - data.images, data.labels, data.class_names)
    got, expected = network(), network()
    one = tuner(got, plain(), 4, seed=3)
    one.run(data, steps=2)
    one.run(other, steps=2)
    generator = torch.Generator().manual_seed(3)
    two = FineTuner(expected, plain(), total_steps=4, generator=generator)
    two.run(data, steps=2)
    again = FineTuner(expected, plain(), total_steps=4, generator=generator)
    again._step, again._optimizer = two._step, two._optimizer
    again._rate = two._rate
    again.run(other, steps=2)
    for a, b in zip(got.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_restart_is_a_new_fine_tuner(data: ImageSet) -> None:
    reused, fresh, teacher = network(), network(), network(seed=1).eval()
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    config = plain(distill_weight=1.0)
    one = FineTuner(reused, config, total_steps=4, generator=generators[0], teacher=teacher)
    one.run(data, steps=4)
    one.restart(total_steps=3)
    one.run(data, steps=3)
    FineTuner(fresh, config, total_steps=4, generator=generators[1], teacher=teacher).run(data, steps=4)
    FineTuner(fresh, config, total_steps=3, generator=generators[1]).run(data, steps=3)
    for a, b in zip(reused.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_no_steps_are_no_loss_and_no_change(data: ImageSet) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert math.isnan(tuner(model, plain(), 1).run(data, steps=0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_loss_that_is_not_finite_is_an_error_with_advice(data: ImageSet) -> None:
    with pytest.raises(DivergedError, match=r"round 2 diverged: got a loss of .*below 1e\+30 may help"):
        tuner(network(), plain(lr=1e30), 9).run(data, steps=9, desc="round 2")
