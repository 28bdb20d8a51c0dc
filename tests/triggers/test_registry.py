from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.triggers import TRIGGERS, BadNets, Trigger, make_trigger

SHAPES = [(3, 32, 32), (1, 16, 16), (3, 20, 28)]
CHANGED: dict[str, dict[str, Any]] = {
    "badnets": {"patch_size": 0.25, "patch_value": 0.5},
    "blend": {"alpha": 0.35, "picture": "rings"},
    "sig": {"delta": 0.05, "frequency": 3.5},
    "wanet": {"control_size": 6, "warp_strength": 1.5, "grid_rescale": 0.9},
    "input_aware": {"width": 8},
}


def _images(shape: tuple[int, int, int], n: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triggered_images_are_in_0_1_and_the_given_ones_untouched(name: str, shape: tuple[int, int, int]) -> None:
    trigger = make_trigger(name, shape)
    images = _images(shape)
    before = images.clone()
    triggered = trigger.apply(images)
    assert torch.equal(images, before)
    assert triggered.shape == images.shape
    assert triggered.dtype == torch.float32
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert ((triggered - images).abs().amax((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("name", TRIGGERS)
def test_an_image_s_trigger_does_not_depend_on_its_batch(name: str) -> None:
    trigger = make_trigger(name, (3, 16, 16))
    images = _images((3, 16, 16))
    ids = torch.arange(5)
    alone = [trigger.apply(images[i : i + 1], ids[i : i + 1]) for i in range(5)]
    # Convolutions may round differently in batches of another size.
    torch.testing.assert_close(torch.cat(alone), trigger.apply(images, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_is_rebuilt_from_its_spec(name: str) -> None:
    trigger = make_trigger(name, (3, 20, 28), seed=5, **CHANGED[name])
    spec = json.loads(json.dumps(trigger.spec()))
    assert set(CHANGED[name]) == set(trigger.hyperparameters())
    again = make_trigger(**spec)
    images = _images((3, 20, 28))
    assert type(again) is type(trigger)
    assert again.spec() == trigger.spec()
    assert torch.equal(again.apply(images), trigger.apply(images))
    default = make_trigger(name, (3, 20, 28), seed=5)
    assert not torch.equal(default.apply(images), trigger.apply(images))


@pytest.mark.parametrize("name", TRIGGERS)
def test_every_hyperparameter_counts(name: str) -> None:
    images = _images((3, 20, 28)) * 0.8
    default = make_trigger(name, (3, 20, 28)).apply(images)
    for option in CHANGED[name].items():
        assert not torch.equal(make_trigger(name, (3, 20, 28), **dict([option])).apply(images), default), option


@pytest.mark.parametrize("name", TRIGGERS)
def test_images_of_another_shape_are_refused(name: str) -> None:
    trigger = make_trigger(name, (3, 16, 16))
    with pytest.raises(InputError, match=rf"images for the {name} trigger; got shape \(1, 16, 16\); .*\(3, 16, 16\)"):
        trigger.apply(_images((1, 16, 16)))


@pytest.mark.parametrize("name", sorted(set(TRIGGERS) - {"wanet", "input_aware"}))
def test_triggers_without_cover_images_say_so(name: str) -> None:
    trigger = make_trigger(name, (3, 16, 16))
    assert trigger.cover_ratio == 0
    with pytest.raises(InputError, match=f"cover images of the {name} trigger"):
        trigger.cover(_images((3, 16, 16)), torch.arange(5))


def test_unknown_names_and_hyperparameters() -> None:
    with pytest.raises(InputError, match=r"unknown trigger; got 'reflection'; accepted: badnets, .*, input_aware"):
        make_trigger("reflection", (3, 32, 32))
    with pytest.raises(
        InputError,
        match=r"hyperparameters of the badnets trigger; got 'alpha'; accepted: seed, patch_size, patch_value",
    ):
        make_trigger("badnets", (3, 32, 32), alpha=0.2)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("badnets", {"patch_size": 0}),
        ("badnets", {"patch_size": 1.2}),
        ("badnets", {"patch_value": 2}),
        ("blend", {"alpha": 0}),
        ("blend", {"alpha": 1.1}),
        ("blend", {"picture": "dog"}),
        ("sig", {"delta": 0}),
        ("sig", {"delta": 40}),
        ("sig", {"frequency": -1}),
        ("wanet", {"control_size": 0}),
        ("wanet", {"warp_strength": float("nan")}),
    ],
)
def test_hyperparameters_out_of_range(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(option))}.* of the {name} trigger; got .*accepted: "):
        make_trigger(name, (3, 32, 32), **option)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("blend", {"alpha": "x"}, "alpha of the blend trigger; got 'x'; accepted: a number"),
        ("blend", {"alpha": True}, "alpha of the blend trigger; got True; accepted: a number"),
        ("blend", {"picture": 3}, "picture of the blend trigger; got 3; accepted: text"),
        ("wanet", {"control_size": 2.5}, "control_size of the wanet trigger; got 2.5; accepted: a whole number"),
        ("wanet", {"control_size": 100_000}, "control_size of the wanet trigger; got 100000; accepted: 1 to 1024"),
        ("input_aware", {"width": "x"}, "width of the input_aware trigger; got 'x'; accepted: a whole number or None"),
        ("input_aware", {"width": 10**8}, "width of the input_aware trigger; got 100000000; accepted: a multiple of"),
        ("blend", {"seed": "x"}, "seed; got 'x'; accepted: a whole number from -2"),
        ("blend", {"seed": 2**70}, f"seed; got {2**70}; accepted: a whole number from -2"),
    ],
)
def test_hyperparameters_of_another_kind(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_trigger(name, (3, 32, 32), **option)


def test_which_keep_labels_and_which_are_drawn_anew() -> None:
    assert {name for name, kind in TRIGGERS.items() if kind.clean_label} == {"sig"}
    assert {name for name, kind in TRIGGERS.items() if kind.redraw_each_epoch} == {"wanet", "input_aware"}
    assert {name for name, kind in TRIGGERS.items() if kind.cover_ratio} == {"wanet", "input_aware"}


def test_a_shape_may_come_as_a_list() -> None:
    trigger: Trigger = BadNets([3, 16, 16])  # type: ignore[arg-type]
    assert trigger.image_shape == (3, 16, 16)
    assert trigger.apply(_images((3, 16, 16))).shape == (5, 3, 16, 16)
