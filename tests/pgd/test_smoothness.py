from __future__ import annotations

from typing import Any

import pytest
import torch
from attacked import SHAPE, predictions
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attacker import PGD
from pbe_fast.config import PGDConfig
from pbe_fast.models import Normalized
from pbe_fast.pgd import pgd_attack
from pbe_fast.smoothness import smooth_step_, spread_matrices

SIZES = [(3, 32, 32), (1, 33, 47), (2, 5, 3), (3, 1, 9)]


@pytest.mark.parametrize("grid", [1, 4, 8])
@pytest.mark.parametrize("shape", SIZES)
def test_a_grid_is_spread_as_interpolation_spreads_it(shape: tuple[int, ...], grid: int) -> None:
    rows, columns = spread_matrices(grid, shape)
    sides = [min(grid, side) for side in shape[1:]]
    assert [matrix.shape[1] for matrix in (rows, columns)] == sides
    values = torch.randn(2, shape[0], *sides, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(rows @ values @ columns.T, expected, rtol=1e-5, atol=1e-6)
    for matrix in (rows, columns):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix)))


def test_a_step_is_one_of_the_grid_by_the_sign_of_its_own_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 16, 12, generator=generator) * 0.2 + 0.4
    weight = torch.randn(4, 3, 16, 12, generator=generator)
    values = torch.zeros(4, 3, 4, 4, requires_grad=True)
    change = F.interpolate(values, (16, 12), mode="bilinear", align_corners=False)
    # Of a loss that is linear in the pixels; autograd tells its gradient with respect to the grid.
    (gradient,) = torch.autograd.grad((weight * change).sum(), values)
    expected = images + F.interpolate(0.03 * gradient.sign(), (16, 12), mode="bilinear", align_corners=False)
    adversarial = images.clone()
    assert (
        smooth_step_(adversarial, weight, images, spread_matrices(4, images.shape), eps=0.1, alpha=0.03) is adversarial
    )
    torch.testing.assert_close(adversarial, expected)


def test_what_it_changes_is_smooth_within_its_radius_and_raises_the_loss(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    images = images * 0.4 + 0.3  # so that nothing meets the ends of [0, 1]
    config = PGDConfig(eps=0.2, grid=4)
    adversarial = pgd_attack(model, images, labels, config)
    change = adversarial - images
    assert float(change.abs().max()) <= 0.2 + 1e-6
    assert float(change.abs().amax((1, 2, 3)).min()) > 0.1
    rows, columns = spread_matrices(4, images.shape)
    # Nothing of it is outside of what a grid can make, but for what the ball cuts off.
    within = torch.linalg.pinv(rows)
    projected = rows @ (within @ change @ torch.linalg.pinv(columns).T) @ columns.T
    assert float((projected - change).norm() / change.norm()) < 0.15
    with torch.no_grad():
        before, after = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, adversarial))
    assert float((after > before).float().mean()) > 0.9


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("options", [{}, {"steps": 3, "alpha": 0.1}])
def test_the_attack_as_an_object_gives_the_same_images(
    model: nn.Module, images: Tensor, labels: Tensor, options: dict[str, Any], normalised: bool
) -> None:
    if normalised:
        model = Normalized(model, (0.5, 0.4, 0.6), (0.3,) * 3).eval()
    config = PGDConfig(eps=0.3, grid=4, **options)
    pixels = PGD(model, PGDConfig(), image_shape=SHAPE, batch_size=4)
    first = pixels(images, labels)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4, beside=pixels)
    found = attack(images, labels)
    expected = pgd_attack(model, images, labels, config)
    # A value whose gradient is nearly zero may go the other way.
    assert float(((found - expected).abs() > 1e-4).float().mean()) < 0.02
    # The buffers and the copy that they share are left to the other as they were.
    assert torch.equal(pixels(images, labels), first)
    assert torch.equal(attack(images, labels), found)


def test_it_stops_early_where_it_is_asked_to(model: nn.Module, images: Tensor) -> None:
    labels = predictions(model, images)
    config = PGDConfig(eps=0.3, grid=4, steps=8, early_stop=True)
    found = PGD(model, config, image_shape=SHAPE, batch_size=4)(images, labels)
    whole = pgd_attack(model, images, labels, config)
    moved, all_the_way = ((x - images).abs().amax((1, 2, 3)) for x in (found, whole))
    fooled = predictions(model, found) != labels
    assert bool(fooled.any()) and bool((moved <= all_the_way + 1e-5).all()) and bool((moved < all_the_way).any())


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
def test_a_gpu_replays_it_as_a_graph(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model, images, labels = Normalized(model, (0.5,) * 3, (0.3,) * 3).eval().cuda(), images.cuda(), labels.cuda()
    config = PGDConfig(eps=0.3, grid=4)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4)
    for _ in range(3):
        found = attack(images, labels)
    assert attack._run_all.captured
    expected = pgd_attack(model, images, labels, config)
    assert float(((found - expected).abs() > 1e-3).double().mean()) < 0.02
