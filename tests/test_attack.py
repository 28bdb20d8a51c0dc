from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.data.augment import augment as move_all
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.seeding import seeded
from pbe_fast.errors import InputError
from pbe_fast.finetune import FineTuner
from pbe_fast.metrics import evaluate
from pbe_fast.poison import poison, triggered_test_set
from pbe_fast.triggers import BadNets, Trigger, WaNet, make_trigger

SHAPE = (1, 8, 8)
TRAINING = FineTuneConfig(lr=0.05, batch_size=32, augment="none", mix_clean=False, distill_weight=0.0)


def _data(n: int = 160, seed: int = 0) -> ImageSet:
    """Four classes: which quarter of a noisy image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 60, (n, *SHAPE), dtype=torch.uint8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[i, 0, row : row + 3, column : column + 3] += 120
    return ImageSet(images, labels, tuple("abcd"), name="quarters")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 4)
    )


def _train(model: nn.Module | None = None, *, attack: str = "badnets", epochs: int = 2, seed: int = 0) -> InfectedModel:
    config = AttackConfig(attack=attack, epochs=epochs, training=TRAINING, poison_rate=0.1)
    return train_infected(
        model or _network(), _data(), config=config, seed=seed, device="cpu", precision="fp32", progress=False
    )


class Noted(Trigger):
    """The corner set to 1; keeps a note of which images it was put on."""

    name = "noted"

    def __init__(self, *, redraw: bool) -> None:
        super().__init__(SHAPE)
        self.redraw_each_epoch = redraw  # type: ignore[misc]
        self.notes: list[list[int]] = []

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        assert image_ids is not None
        self.notes.append(sorted(image_ids.tolist()))
        out = images.clone()
        out[:, :, -1, -1] = 1
        return out


def test_it_infects_the_model_and_keeps_its_accuracy() -> None:
    infected = _train(epochs=12)
    test = _data(seed=1)
    metrics = evaluate(infected.model, test, triggered_test_set(test, infected.trigger))
    assert metrics.acc > 0.95
    assert metrics.asr is not None and metrics.asr > 0.95
    assert len(infected.losses) == 12
    assert infected.losses[-1] < 0.3 * infected.losses[0]


def test_what_it_returns() -> None:
    infected = _train(seed=3)
    assert not any(m.training for m in infected.model.modules())
    assert isinstance(infected.trigger, BadNets)
    assert infected.seed == 3
    assert infected.config.epochs == 2
    mask = infected.train_data.poison_mask
    assert mask is not None
    assert int(mask.sum()) == 16
    assert infected.train_data.true_labels is not None


def test_the_caller_s_model_and_data_are_not_changed() -> None:
    model, data = _network(), _data()
    model.get_submodule("1").eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    images = data.images.clone()
    config = AttackConfig(attack="badnets", epochs=1, training=TRAINING)
    train_infected(model, data, config=config, device="cpu", progress=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(data.images, images)


def test_the_seed_fixes_everything_dropout_included() -> None:
    results = []
    for outer, seed in ((1, 0), (2, 0), (2, 1)):
        model = _network()
        torch.manual_seed(outer)
        results.append(_train(model, seed=seed))
    first, again, other = (predict_logits(r.model, _data().images) for r in results)
    assert torch.equal(first, again)
    assert results[0].losses == results[1].losses
    assert not torch.equal(first, other)
    masks = [r.train_data.poison_mask for r in results]
    assert masks[0] is not None and masks[1] is not None and masks[2] is not None
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("redraw", [False, True])
def test_the_poisoned_subset_is_drawn_anew_in_every_epoch_where_the_trigger_asks_for_it(redraw: bool) -> None:
    trigger = Noted(redraw=redraw)
    config = AttackConfig(epochs=3, training=TRAINING, poison_rate=0.1)
    infected = train_infected(_network(), _data(), config=config, trigger=trigger, device="cpu", progress=False)
    assert all(len(note) == 16 for note in trigger.notes)
    handed_back, *epochs = trigger.notes
    assert len({tuple(note) for note in epochs}) == len(epochs) == (3 if redraw else 0)
    assert not epochs or epochs[0] == handed_back
    mask = infected.train_data.poison_mask
    assert mask is not None
    assert mask.nonzero()[:, 0].tolist() == handed_back
    assert infected.config.attack == "noted"  # what was done, not the default


def test_images_that_are_drawn_anew_are_moved_before_they_get_the_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ImageSet] = []

    class Watched(FineTuner):
        def run(self, data: ImageSet, **options: Any) -> float:
            seen.append(data.select(range(len(data))))
            return super().run(data, **options)

    monkeypatch.setattr("pbe_fast.attack.FineTuner", Watched)
    training = dataclasses.replace(TRAINING, augment="crop+flip")
    config = AttackConfig(epochs=2, training=training, poison_rate=0.1)
    data = _data()
    infected = train_infected(_network(), data, config=config, trigger=Noted(redraw=True), device="cpu", progress=False)
    first, second = seen
    assert not torch.equal(first.images, second.images)
    for epoch in seen:
        mask = epoch.poison_mask
        assert mask is not None
        # The trigger is where it belongs, whatever became of the image below it, and nowhere else.
        assert (epoch.images[mask][:, 0, -1, -1] == 255).all()
        unmoved = (epoch.images == data.images).flatten(1).all(1)
        assert unmoved.double().mean() < 0.5
        # A move loses pixels at the border and takes none from elsewhere.
        assert (epoch.images[~mask].flatten(1).sum(1) <= data.images[~mask].flatten(1).sum(1)).all()
    # What is handed back is the training set as its owner has it.
    clean = ~infected.train_data.poison_mask  # type: ignore[operator]
    assert torch.equal(infected.train_data.images[clean], data.images[clean])


@pytest.mark.parametrize("redraw", [False, True])
def test_all_epochs_read_one_set_in_one_place(monkeypatch: pytest.MonkeyPatch, redraw: bool) -> None:
    seen: list[tuple[ImageSet, int, int]] = []

    class Watched(FineTuner):
        def run(self, data: ImageSet, **options: Any) -> float:
            seen.append((data, data.images.data_ptr(), data.labels.data_ptr()))
            return super().run(data, **options)

    monkeypatch.setattr("pbe_fast.attack.FineTuner", Watched)
    config = AttackConfig(epochs=3, training=TRAINING, poison_rate=0.1)
    trigger = Noted(redraw=redraw)
    train_infected(_network(), _data(), config=config, trigger=trigger, device="cpu", progress=False)
    assert len(seen) == 3
    assert all(epoch == seen[0] for epoch in seen)


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("attack", ["badnets", "wanet"])
def test_the_epochs_are_those_of_a_plain_loop(attack: str, augment: str) -> None:
    training = dataclasses.replace(TRAINING, augment=augment)
    config = AttackConfig(attack=attack, epochs=3, training=training, poison_rate=0.1)
    data = _data()
    got = train_infected(_network(), data, config=config, seed=1, device="cpu", precision="fp32", progress=False)

    model = _network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trigger = make_trigger(attack, SHAPE, seed=1)
    if trigger.redraw_each_epoch:
        training = dataclasses.replace(training, augment="none")
    generator = torch.Generator().manual_seed(1)
    losses = []
    with seeded(1, torch.device("cpu")):
        tuner = FineTuner(model, training, total_steps=15, generator=generator)
        for epoch in range(3):
            draw = 10_007 + epoch if trigger.redraw_each_epoch else 10_007
            images = move_all(data.images, augment, generator) if trigger.redraw_each_epoch else data.images
            poisoned = poison(dataclasses.replace(data, images=images), trigger, poison_rate=0.1, seed=draw)
            losses.append(tuner.run(poisoned, steps=5))
    assert got.losses == losses
    assert all(torch.equal(value, got.model.state_dict()[name]) for name, value in model.state_dict().items())
    # What is handed back is the first draw, on images where they were.
    first = poison(data, trigger, poison_rate=0.1, seed=10_007)
    assert torch.equal(got.train_data.images, first.images)
    assert torch.equal(got.train_data.labels, first.labels)


def test_the_attack_is_the_one_that_the_options_name() -> None:
    infected = _train(attack="wanet", seed=4)
    assert isinstance(infected.trigger, WaNet)
    assert infected.trigger.spec() == make_trigger("wanet", SHAPE, seed=4).spec()


def test_a_model_in_half_precision_is_trained_in_float32() -> None:
    infected = _train(_network().half())
    assert all(p.dtype == torch.float32 for p in infected.model.parameters())


def test_data_that_the_attack_cannot_use_are_refused_before_training() -> None:
    model = _network()
    state = copy.deepcopy(model.state_dict())
    config = AttackConfig(attack="sig", poison_rate=0.3, training=TRAINING)
    with pytest.raises(InputError, match="got 48 images to poison, but 40 images of class 0"):
        train_infected(model, _data(), config=config, progress=False)
    with pytest.raises(InputError, match="target_label; got 4; accepted: 0 to 3"):
        train_infected(model, _data(), config=AttackConfig(target_label=4), progress=False)
    with pytest.raises(InputError, match="unknown trigger; got 'nothing'"):
        train_infected(model, _data(), config=AttackConfig(attack="nothing"), progress=False)
    with pytest.raises(InputError, match=r"fewer logits than the data has classes; got 3 logits"):
        train_infected(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), _data(), progress=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_largest_seed_will_do() -> None:
    assert _train(seed=2**63 - 1).seed == 2**63 - 1
