from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe_fast.config import WaveConfig
from pbe_fast.waves import Waves, add_waves


def spectrum(images: Tensor) -> Tensor:
    """The frequency (rows, columns) in cycles per pixel that each picture has most of."""
    side = 64  # padded, so that frequencies between those of the grid show
    strength = torch.fft.rfft2(images[:, 0] - images[:, 0].mean((1, 2), keepdim=True), (side, side)).abs()
    at = strength.flatten(1).argmax(1)
    down, across = at // strength.shape[2], at % strength.shape[2]
    return torch.stack([torch.where(down > side // 2, down - side, down), across], 1) / side


def test_each_image_gets_one_wave_of_the_amplitude_in_all_channels() -> None:
    images = torch.full((200, 3, 24, 32), 0.5)
    got = add_waves(images, torch.arange(200), WaveConfig(amplitude=0.2), seed=1)
    assert got.dtype == torch.float32
    assert torch.equal(got[:, 0], got[:, 1]) and torch.equal(got[:, 0], got[:, 2])
    reached = (got - 0.5).abs().amax((1, 2, 3))
    assert reached.max() <= 0.2 + 1e-6
    assert reached.median() > 0.19
    # Of a wave half of the power is the amplitude's square, unless it is too slow for one period.
    assert (got - 0.5).square().mean((1, 2, 3)).median() == pytest.approx(0.02, abs=0.002)


@pytest.mark.parametrize(("size", "cycles", "highest"), [(32, 8.0, 0.25), (64, 8.0, 0.125), (8, 8.0, 0.5)])
def test_frequencies_fill_what_is_asked_for_on_both_sides(size: int, cycles: float, highest: float) -> None:
    count = 600
    images = torch.full((count, 1, size, size), 0.5)
    got = add_waves(images, torch.arange(count), WaveConfig(max_cycles=cycles), seed=2)
    found = spectrum(got[:, :, :32, :32])
    assert found.abs().max() <= highest + 1 / 32
    assert found[:, 0].max() > 0.8 * highest and found[:, 1].max() > 0.8 * highest
    if size == 32:
        assert found[:, 0].min() < -0.8 * highest
        # Uniform: half of them in the inner half, on each axis.
        assert (found.abs() < highest / 2).double().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.08)


def test_a_wave_belongs_to_seed_and_image_and_stays_in_the_box() -> None:
    images = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    before, ids, config = images.clone(), torch.tensor([3, 2**40, 9, 1, 0, 5]), WaveConfig(amplitude=0.6)
    first = add_waves(images, ids, config, seed=4)
    assert torch.equal(images, before)
    assert first.min() == 0 and first.max() == 1
    torch.testing.assert_close(add_waves(images[[4, 1]], ids[[4, 1]], config, seed=4), first[[4, 1]])
    labels = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(Waves(config)(images, labels, ids, seed=4), first)
    for other in (add_waves(images, ids, config, seed=5), add_waves(images, ids + 1, config, seed=4)):
        assert all(not torch.allclose(a, b) for a, b in zip(other, first, strict=True))
    last = images.contiguous(memory_format=torch.channels_last)
    got = add_waves(last, ids, config, seed=4)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, first)
    assert add_waves(images[:0], ids[:0], config, seed=4).shape == (0, 3, 9, 7)


def test_half_of_the_waves_are_within_a_period_of_given_frequencies_the_others_anywhere() -> None:
    images, ids = torch.full((1200, 1, 32, 32), 0.5), torch.arange(1200)
    config = WaveConfig(near=((0, 6), (-5, 3)))
    got, anywhere = add_waves(images, ids, config, seed=3), add_waves(images, ids, WaveConfig(), seed=3)
    moved = (got != anywhere).flatten(1).any(1)
    assert moved.double().mean() == pytest.approx(0.5, abs=0.05)
    found = 32 * spectrum(got[moved])
    off = torch.stack([(found - torch.tensor(centre)).abs().amax(1) for centre in config.near], 1)
    assert off.amin(1).max() <= 1 + 0.5  # what the spectrum resolves
    assert (off.argmin(1) == 0).double().mean() == pytest.approx(0.5, abs=0.1)
    # All around each, not at it.
    for i, centre in enumerate(config.near):
        beside = (found - torch.tensor(centre))[off.argmin(1) == i]
        assert (beside > 0.4).any(0).all() and (beside < -0.4).any(0).all()
