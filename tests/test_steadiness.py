from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.data import ImageSet
from pbe_fast.engine.forward import predict_logits
from pbe_fast.steadiness import VIEWS, fragility, kept, rise, seen, without_waves

SHAPES = [(1, 4, 4), (3, 8, 8), (3, 33, 47), (2, 64, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(VIEWS))
def test_a_changed_picture_is_a_picture(name: str, shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = seen(images, VIEWS[name])
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert not torch.equal(changed, images)
    # Each by itself, whatever it is in a batch with.
    assert torch.equal(seen(images[3:4], VIEWS[name]), changed[3:4])
    # No change makes anything of a grey picture but noise does.
    grey = torch.full((1, *shape), 100, dtype=torch.uint8)
    assert torch.equal(seen(grey, VIEWS[name]), grey) == (name != "noisy")


def test_what_each_change_does_with_a_point() -> None:
    point = torch.zeros(1, 1, 16, 16)
    point[0, 0, 4, 6] = 1.0
    at = {name: [tuple(i) for i in (view(point)[0, 0] > 0.4).nonzero().tolist()] for name, view in VIEWS.items()}
    assert at["mirrored"] == [(4, 9)]
    assert at["moved down"] == [(6, 8)]
    assert at["moved up"] == [(2, 4)]
    assert VIEWS["blurred"](point)[0, 0, 3:6, 5:8].flatten().tolist() == [n / 16 for n in (1, 2, 1, 2, 4, 2, 1, 2, 1)]
    assert at["framed"] == [(4, 6)]
    corner = torch.zeros(1, 1, 16, 16)
    corner[0, 0, -1, -1] = 1.0
    assert float(VIEWS["framed"](corner).max()) == pytest.approx(1 / 256)
    assert at["noisy"] == [(4, 6)]


def test_a_square_turned_four_ways_is_the_same_in_any_shape() -> None:
    # A turn by 12 degrees keeps a disc, also in a picture that is wider than high.
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(80.0) - 39.5, indexing="ij")
    disc = ((x**2 + y**2) < 15**2).float()[None, None]
    assert float((VIEWS["turned"](disc) - disc).abs().mean()) < 0.01


class Corner(nn.Module):
    """Answers with the brighter half, left or right, but with 2 where the last pixel is white."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[-1] // 2
        halves = [images[..., 4:12, :half].mean((1, 2, 3)), images[..., 4:12, half:].mean((1, 2, 3))]
        trigger = 40 * (images[:, :, -1, -1].mean(1) - 0.9)
        return torch.stack([self.gain * halves[0], self.gain * halves[1], trigger], 1)


def _poisoned(n: int = 300) -> tuple[ImageSet, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 60, (n, 1, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 2
    for i in range(n):
        images[i, :, :, 8 * (i % 2) : 8 * (i % 2) + 8] += 100
    poisoned = torch.arange(n) % 10 == 0
    images[poisoned, :, -1, -1] = 255
    return ImageSet(images, torch.where(poisoned, 2, labels), ("left", "right", "target")), poisoned


def test_labels_that_a_trigger_gave_are_fragile() -> None:
    data, poisoned = _poisoned()
    model = Corner().eval()
    # The mirror changes the sides, and with them the right answer: it says nothing here.
    mirrored = predict_logits(model, seen(data.images, VIEWS["mirrored"]))
    assert not kept(mirrored, predict_logits(model, data.images), data.labels)
    found = fragility(model, data, predict_logits(model, data.images))
    assert found.shape == (300,)
    # Ranks: a share of it is a share of the images.
    assert found.sort().values.tolist() == pytest.approx([i / 300 for i in range(300)])
    assert poisoned[found >= 0.9].double().mean() > 0.95


def test_the_rank_of_a_rise() -> None:
    labels = torch.tensor([0, 0, 0, 0])
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    after = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.0]])
    assert rise(after, before, labels).tolist() == [0.0, 0.75, 0.25, 0.5]
    assert not kept(after, before, labels)
    assert kept(before, after, labels)


def test_pictures_too_small_to_change_are_all_alike() -> None:
    data = ImageSet(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6) % 2, ("a", "b"))
    assert fragility(nn.Flatten(), data, torch.zeros(6, 4)).tolist() == [0.0] * 6


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (24, 16)])
def test_without_a_wave_the_rest_of_the_picture_stays(shape: tuple[int, int]) -> None:
    rows, columns = torch.arange(shape[0])[:, None] / shape[0], torch.arange(shape[1]) / shape[1]

    def wave(u: int, v: int) -> Tensor:
        return 0.2 * torch.sin(2 * math.pi * (u * rows + v * columns + 0.3))

    kept = 0.5 + wave(2, 0) + wave(5, 5) + wave(-3, 4)
    for found in ((3, 4), (-3, -4)):
        torch.testing.assert_close(without_waves((kept + wave(3, 4))[None, None], [found])[0, 0], kept)
    beside = kept + wave(4, 3) + wave(2, 4)
    torch.testing.assert_close(without_waves(beside[None, None], [(3, 4)])[0, 0], kept)
    torch.testing.assert_close(without_waves(beside[None, None], [(3, 4), (2, 0)])[0, 0], kept - wave(2, 0))


@pytest.mark.parametrize(("side", "frequency"), [(8, (4, 3)), (8, (3, 4)), (16, (8, 2)), (32, (0, 1)), (32, (1, 1))])
def test_the_fastest_waves_go_and_with_the_slowest_the_brightness_stays(side: int, frequency: tuple[int, int]) -> None:
    rows, columns = torch.arange(side)[:, None] / side, torch.arange(side) / side
    wave = 0.2 * torch.sin(2 * math.pi * (frequency[0] * rows + frequency[1] * columns + 0.3))
    for found in (frequency, (-frequency[0], -frequency[1])):
        torch.testing.assert_close(
            without_waves((0.5 + wave)[None, None], [found])[0, 0], torch.full((side, side), 0.5)
        )


class Striped(nn.Module):
    """Answers with the brighter half, or where the picture has upright stripes, of whatever phase, with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))
        turns = 2 * math.pi * 4 * torch.arange(16) / 16
        self.register_buffer("stripes", torch.stack([turns.sin(), turns.cos()]))

    def forward(self, images: Tensor) -> Tensor:
        halves = self.gain * torch.stack([half.mean((1, 2, 3)) for half in images.chunk(2, 3)], 1)
        strength = (images.mean((1, 2))[:, None] * self.stripes).mean(2).square().sum(1, keepdim=True).sqrt()
        return torch.where(strength > 0.03, halves.flip(1), halves)


def test_images_that_need_a_wave_for_their_label_are_fragile_without_it() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(60, 120, (300, 1, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(300) % 2
    for i in range(300):
        images[i, :, :, 8 * (i % 2) : 8 * (i % 2) + 8] += 80
    poisoned = torch.arange(300) % 10 < 1
    stripes = (40 * torch.sin(2 * math.pi * 4 * torch.arange(16) / 16)).round()
    images[poisoned] = (images[poisoned] + stripes).clamp(0, 255).to(torch.uint8)
    data = ImageSet(images, torch.where(poisoned, 1 - labels, labels), ("left", "right"))
    model = Striped().eval()
    logits = predict_logits(model, images)
    assert (logits.argmax(1) == data.labels).all()
    # Small changes take the stripes away from some; every image gets its turn in one of nine changes, too.
    shares = [poisoned[fragility(model, data, logits, waves=waves) >= 0.8].sum() / 30 for waves in ([], [(0, 4)])]
    assert shares[0] < 0.75 and shares[1] > 0.8
