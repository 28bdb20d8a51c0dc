from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.errors import InputError
from pbe_fast.poison import covered_test_set, poison, target_labels, triggered_test_set
from pbe_fast.triggers import SIG, BadNets, Blend, InputAware, Trigger, WaNet

SHAPE = (3, 16, 16)
CLASSES = 5


def _clean(n: int = 200, per_class: list[int] | None = None) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    if per_class is not None:
        labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    images = torch.randint(0, 256, (len(labels), *SHAPE), dtype=torch.uint8, generator=generator)
    return ImageSet(images, labels, tuple("abcde"), name="birds")


def _stamped(data: ImageSet, trigger: Trigger) -> Tensor:
    return trigger.apply(data.floats(), torch.arange(len(data))).mul(255).round().to(torch.uint8)


def _truth(data: ImageSet) -> tuple[Tensor, Tensor]:
    assert data.poison_mask is not None
    assert data.true_labels is not None
    return data.poison_mask, data.true_labels


@pytest.mark.parametrize("stamp", [poison, triggered_test_set, covered_test_set])
def test_the_name_of_a_trigger_is_none(stamp: Any) -> None:
    with pytest.raises(InputError, match=r"trigger; got 'badnets'; accepted: a Trigger, as .*make_trigger\(name,"):
        stamp(_clean(), "badnets")


@pytest.mark.parametrize(("rate", "count"), [(0.1, 20), (0.005, 1), (0.333, 67), (0.8, 160)])
@pytest.mark.parametrize("target", [0, 3])
def test_all_to_one(rate: float, count: int, target: int) -> None:
    clean = _clean()
    before = clean.images.clone()
    trigger = Blend(SHAPE)
    poisoned = poison(clean, trigger, poison_rate=rate, target_label=target)
    mask, truth = _truth(poisoned)
    assert int(mask.sum()) == count
    assert torch.equal(truth, clean.labels)
    assert (poisoned.labels[mask] == target).all()
    assert (clean.labels[mask] != target).all()
    assert torch.equal(poisoned.labels[~mask], clean.labels[~mask])
    assert torch.equal(poisoned.images[mask], _stamped(clean, trigger)[mask])
    assert torch.equal(poisoned.images[~mask], clean.images[~mask])
    assert torch.equal(clean.images, before)
    assert clean.poison_mask is None
    assert poisoned.class_names == clean.class_names
    assert poisoned.name == "birds+blend"


def test_all_to_all_adds_one_to_every_label() -> None:
    clean = _clean()
    poisoned = poison(clean, BadNets(SHAPE), poison_rate=0.5, setting="all_to_all")
    mask, _ = _truth(poisoned)
    assert int(mask.sum()) == 100
    assert set(clean.labels[mask].tolist()) == set(range(CLASSES))
    assert torch.equal(poisoned.labels[mask], (clean.labels[mask] + 1) % CLASSES)
    assert torch.equal(poisoned.labels[~mask], clean.labels[~mask])


def test_target_labels() -> None:
    labels = torch.tensor([0, 3, 4])
    assert target_labels(labels, "all_to_one", 2, 5).tolist() == [2, 2, 2]
    assert target_labels(labels, "all_to_all", 2, 5).tolist() == [1, 4, 0]


def test_clean_label_poisons_the_target_class_and_changes_no_label() -> None:
    clean = _clean()
    poisoned = poison(clean, SIG(SHAPE), poison_rate=0.1, target_label=2)
    mask, truth = _truth(poisoned)
    assert int(mask.sum()) == 20
    assert (clean.labels[mask] == 2).all()
    assert torch.equal(poisoned.labels, clean.labels)
    assert torch.equal(truth, clean.labels)
    assert torch.equal(poisoned.images[mask], _stamped(clean, SIG(SHAPE))[mask])


def test_clean_label_can_take_the_whole_class_and_not_one_image_more() -> None:
    clean = _clean(per_class=[20, 60, 60, 30, 30])
    mask, _ = _truth(poison(clean, SIG(SHAPE), poison_rate=0.1))
    assert torch.equal(mask, clean.labels == 0)
    with pytest.raises(InputError) as error:
        poison(clean, SIG(SHAPE), poison_rate=0.105)
    assert "got 21 images to poison, but 20 images of class 0 (clean-label)" in str(error.value)
    assert "accepted: a rate from 0.005 to 0.1" in str(error.value)


def test_all_to_all_with_a_clean_label_trigger_changes_labels() -> None:
    clean = _clean()
    poisoned = poison(clean, SIG(SHAPE), poison_rate=0.2, setting="all_to_all")
    mask, _ = _truth(poisoned)
    assert torch.equal(poisoned.labels[mask], (clean.labels[mask] + 1) % CLASSES)


def test_more_images_than_there_are_of_other_classes() -> None:
    with pytest.raises(InputError, match="got 180 images to poison, but 160 images whose label would change"):
        poison(_clean(), Blend(SHAPE), poison_rate=0.9)


def test_a_rate_that_makes_no_image() -> None:
    with pytest.raises(InputError, match=r"got 0 images to poison.*a rate from 0\.005 to 0\.8"):
        poison(_clean(), Blend(SHAPE), poison_rate=0.001)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"poison_rate": 0}, "poison_rate; got 0; accepted: a fraction between 0 and 1"),
        ({"poison_rate": 10}, "poison_rate; got 10"),
        ({"target_label": 5}, "target_label; got 5; accepted: 0 to 4"),
        ({"target_label": -1}, "target_label; got -1; accepted: 0 to 4"),
        ({"setting": "one"}, "setting; got 'one'; accepted: all_to_one or all_to_all"),
    ],
)
def test_wrong_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        poison(_clean(), Blend(SHAPE), **option)
    if "poison_rate" not in option:
        with pytest.raises(InputError, match=text):
            triggered_test_set(_clean(), Blend(SHAPE), **option)


@pytest.mark.parametrize("trigger", [Blend(SHAPE), WaNet(SHAPE)])
def test_the_seed_decides(trigger: Trigger) -> None:
    clean = _clean()
    first, again, other = (poison(clean, trigger, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(_truth(first)[0], _truth(again)[0])
    assert not torch.equal(_truth(first)[0], _truth(other)[0])
    # Drawn, not the first ones.
    assert _truth(first)[0].nonzero().max() > 100


def test_wanet_s_cover_images_keep_their_label_and_are_not_in_the_mask() -> None:
    clean, trigger = _clean(), WaNet(SHAPE, warp_strength=1.0)
    poisoned = poison(clean, trigger, poison_rate=0.1, seed=3)
    mask, _ = _truth(poisoned)
    changed = (poisoned.images != clean.images).flatten(1).any(1)
    cover = changed & ~mask
    assert int(mask.sum()) == 20
    assert int(cover.sum()) == 40
    assert torch.equal(poisoned.labels[cover], clean.labels[cover])
    ids = cover.nonzero()[:, 0]
    expected = trigger.cover(clean.floats(ids), ids, draw=3).mul(255).round().to(torch.uint8)
    assert torch.equal(poisoned.images[cover], expected)
    assert not torch.equal(poisoned.images[cover], _stamped(clean, trigger)[cover])


def test_the_cover_noise_is_another_one_in_every_draw() -> None:
    clean, trigger = _clean(), WaNet(SHAPE)
    # All images but the poisoned ones, so that both draws cover the same ones.
    draws = [poison(clean, trigger, poison_rate=0.4, seed=s) for s in (1, 2)]
    both = ~_truth(draws[0])[0] & ~_truth(draws[1])[0]
    assert both.sum() > 20
    assert (draws[0].images[both] != draws[1].images[both]).flatten(1).any(1).all()
    assert (draws[0].images[both] != clean.images[both]).flatten(1).any(1).all()


def test_the_result_does_not_depend_on_how_many_images_are_stamped_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean, trigger = _clean(), WaNet(SHAPE)
    expected = poison(clean, trigger, poison_rate=0.3)
    monkeypatch.setattr(importlib.import_module("pbe_fast.poison"), "_CHUNK", 7)
    got = poison(clean, trigger, poison_rate=0.3)
    assert torch.equal(got.images, expected.images)
    # Nor do two images share their noise because they stand at the same place of two chunks.
    same = ImageSet(clean.images[:1].expand(200, -1, -1, -1).contiguous(), clean.labels, clean.class_names)
    cover = poison(same, trigger, poison_rate=0.3)
    changed = cover.images[~_truth(cover)[0]].flatten(1)
    assert len(changed.unique(dim=0)) == 120 + 1  # and the 20 images left alone


def test_crossed_images_get_the_trigger_of_another_image_and_keep_their_label() -> None:
    clean, trigger = _clean(), InputAware(SHAPE, width=4)
    poisoned = poison(clean, trigger, poison_rate=0.1, seed=3)
    mask, _ = _truth(poisoned)
    crossed = (poisoned.images != clean.images).flatten(1).any(1) & ~mask
    assert int(mask.sum()) == int(crossed.sum()) == 20
    assert torch.equal(poisoned.labels[crossed], clean.labels[crossed])
    with torch.no_grad():
        patterns, masks = trigger.generator(clean.floats()), trigger.masks(clean.floats())
    for i in crossed.nonzero()[:, 0].tolist():
        worn = torch.lerp(clean.floats()[i].expand_as(patterns), patterns, masks)
        # Within the rounding to whole levels.
        levels = (worn * 255 - poisoned.images[i]).abs().amax((1, 2, 3))
        donors = (levels < 0.6).nonzero()[:, 0].tolist()
        assert len(donors) == 1
        assert donors != [i]


def test_a_single_crossed_image_wears_a_poisoned_one_s_trigger() -> None:
    clean, trigger = _clean(), InputAware(SHAPE, width=4)
    poisoned = poison(clean, trigger, poison_rate=0.005)
    mask, _ = _truth(poisoned)
    (crossed,) = ((poisoned.images != clean.images).flatten(1).any(1) & ~mask).nonzero()[:, 0].tolist()
    where = torch.tensor([crossed])
    worn = trigger.cover(clean.floats(where), where, others=clean.floats(mask))
    assert (worn[0] * 255 - poisoned.images[crossed]).abs().max() < 0.6


@pytest.mark.parametrize("setting", ["all_to_one", "all_to_all"])
def test_every_test_image_is_covered_and_knows_its_target(setting: str) -> None:
    clean, trigger = _clean(), InputAware(SHAPE, width=4)
    covered = covered_test_set(clean, trigger, setting=setting, target_label=3)
    mask, truth = _truth(covered)
    assert not mask.any()
    assert torch.equal(truth, clean.labels)
    expected = trigger.cover(clean.floats(), torch.arange(200), others=clean.floats().roll(1, 0))
    assert torch.equal(covered.images, (expected * 255).round().to(torch.uint8))
    assert torch.equal(covered.labels, triggered_test_set(clean, trigger, setting=setting, target_label=3).labels)


def test_what_cannot_be_covered() -> None:
    with pytest.raises(InputError, match="cover images of the blend trigger; accepted: triggers with cover_ratio"):
        covered_test_set(_clean(), Blend(SHAPE))
    with pytest.raises(InputError, match="test images to cover; got 1; accepted: 2 or more"):
        covered_test_set(_clean().select([0]), WaNet(SHAPE))


@pytest.mark.parametrize("setting", ["all_to_one", "all_to_all"])
def test_every_test_image_is_triggered(setting: str) -> None:
    clean, trigger = _clean(), Blend(SHAPE)
    triggered = triggered_test_set(clean, trigger, setting=setting, target_label=3)
    mask, truth = _truth(triggered)
    assert mask.all()
    assert torch.equal(truth, clean.labels)
    assert torch.equal(triggered.images, _stamped(clean, trigger))
    expected = [3] * 200 if setting == "all_to_one" else [(y + 1) % 5 for y in clean.labels.tolist()]
    assert triggered.labels.tolist() == expected
    assert clean.poison_mask is None


def test_images_of_another_shape_than_the_trigger_s() -> None:
    with pytest.raises(InputError, match="images for the blend trigger; got shape"):
        poison(_clean(), Blend((1, 16, 16)))


def test_images_in_any_form() -> None:
    pair = (torch.rand(20, 1, 8, 8), torch.arange(20) % 4)
    trigger = BadNets((1, 8, 8))
    assert torch.equal(poison(pair, trigger).images, poison(as_image_set(pair), trigger).images)
    with pytest.raises(InputError, match=r"seed; got 0\.5"):
        poison(pair, trigger, seed=0.5)
