from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.triggers import BadNets, InputAware, make_trigger


def _images(shape: tuple[int, int, int], n: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 7, 13), (1, 1, 1), (3, 50, 9)])
def test_any_height_and_width(shape: tuple[int, int, int]) -> None:
    trigger = InputAware(shape, width=8)
    images = _images(shape)
    masks = trigger.masks(images)
    assert masks.shape == (5, 1, *shape[1:])
    assert masks.min() >= 0
    assert masks.max() <= 1
    worn, patterns = trigger.wear(images, images)
    assert worn.shape == patterns.shape == images.shape
    assert patterns.min() >= 0
    assert patterns.max() <= 1
    assert trigger.apply(images).shape == images.shape


def test_x_times_1_minus_m_plus_p_times_m() -> None:
    shape = (3, 12, 12)
    trigger = InputAware(shape, seed=1)
    images, others = _images(shape), _images(shape, seed=1)
    with torch.no_grad():
        p, m = trigger.generator(images), trigger.masks(images)
        torch.testing.assert_close(trigger.apply(images), images * (1 - m) + p * m)
        p, m = trigger.generator(others), trigger.masks(others)
    crossed = trigger.cover(images, torch.arange(5), others=others)
    torch.testing.assert_close(crossed, images * (1 - m) + p * m)
    # Of the same images the trigger is their own.
    assert torch.equal(trigger.cover(images, torch.arange(5), others=images), trigger.apply(images))


def test_masks_are_sharpened() -> None:
    trigger = InputAware((1, 8, 8))
    images = _images((1, 8, 8))
    with torch.no_grad():
        soft = trigger.mask_network(images)
        expected = torch.tanh(20 * soft - 10) / 2 + 0.5
        assert torch.equal(trigger.masks(images), expected)


def test_pattern_and_mask_depend_on_the_image() -> None:
    trigger = InputAware((3, 16, 16))
    images = _images((3, 16, 16), 2)
    with torch.no_grad():
        for outputs in (trigger.generator(images), trigger.masks(images)):
            assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_gradients_go_to_the_generator_alone() -> None:
    trigger = InputAware((1, 8, 8))
    images = _images((1, 8, 8))
    worn, _ = trigger.wear(images, images)
    worn.square().mean().backward()
    assert all(p.grad is not None for p in trigger.generator.parameters())
    assert all(p.grad is None for p in trigger.mask_network.parameters())
    assert not trigger.apply(images).requires_grad


def test_large_sets_go_through_in_parts_of_equal_result(monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = InputAware((1, 8, 8))
    images, others = _images((1, 8, 8), 7), _images((1, 8, 8), 7, seed=1)
    whole = trigger.apply(images), trigger.cover(images, torch.arange(7), others=others)
    monkeypatch.setattr("pbe_fast.triggers.input_aware._CHUNK_PIXELS", 3 * 64)
    parts = trigger.apply(images), trigger.cover(images, torch.arange(7), others=others)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_go_from_one_trigger_to_another() -> None:
    trained, other = InputAware((3, 16, 16), seed=0, width=8), InputAware((3, 16, 16), seed=1, width=8)
    images = _images((3, 16, 16))
    assert not torch.equal(trained.apply(images), other.apply(images))
    weights = trained.weights()
    other.load_weights(weights)
    assert torch.equal(trained.apply(images), other.apply(images))
    # They are copies: what is trained afterwards does not change them.
    with torch.no_grad():
        other.generator.last.bias += 1
    assert not torch.equal(trained.apply(images), other.apply(images))
    assert all(torch.equal(value, weights[name]) for name, value in trained.weights().items())


def test_weights_of_another_trigger_are_refused_and_nothing_changes() -> None:
    trigger = InputAware((3, 16, 16), width=8)
    before = trigger.weights()
    grey = InputAware((1, 16, 16), width=8).weights()
    with pytest.raises(InputError, match=r"weights of the input_aware trigger .*; got .*accepted: "):
        trigger.load_weights(grey)
    missing = dict(before)
    del missing["mask.last.bias"]
    with pytest.raises(InputError, match=r"got mask\.last\.bias: missing, and 0 more"):
        trigger.load_weights(missing)
    with pytest.raises(InputError, match="accepted: extra: no such weight"):
        trigger.load_weights({**before, "extra": torch.zeros(1)})
    broken = {**before, "mask.last.bias": torch.tensor([float("nan")])}
    with pytest.raises(InputError, match="NaN or infinite"):
        trigger.load_weights(broken)
    assert all(torch.equal(value, before[name]) for name, value in trigger.weights().items())


def test_a_trigger_that_is_not_trained_has_no_weights() -> None:
    trigger = BadNets((3, 16, 16))
    assert trigger.weights() == {}
    trigger.load_weights({})
    with pytest.raises(InputError, match="weights of the badnets trigger; got 1 tensors"):
        trigger.load_weights({"a": torch.zeros(1)})


def test_making_one_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    InputAware((3, 16, 16), seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_cover_images_need_others_and_the_width_is_a_multiple_of_4() -> None:
    trigger = InputAware((1, 8, 8))
    images = _images((1, 8, 8))
    with pytest.raises(InputError, match=r"others, .*; got none; accepted: .*\(5, 1, 8, 8\)"):
        trigger.cover(images, torch.arange(5))
    with pytest.raises(InputError, match=r"got shape \(2, 1, 8, 8\)"):
        trigger.cover(images, torch.arange(5), others=images[:2])
    for width in (0, -4, 6):
        with pytest.raises(InputError, match=f"width of the input_aware trigger; got {width}; accepted: a multiple"):
            make_trigger("input_aware", (1, 8, 8), width=width)


def test_the_default_width_is_the_authors() -> None:
    assert (InputAware((3, 8, 8)).width, InputAware((1, 8, 8)).width) == (32, 16)
