from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.config import PGDConfig
from pbe_fast.pgd import input_gradient, pgd_attack, random_start, random_windows


def literal_pgd(model: nn.Module, x: Tensor, y: Tensor, config: PGDConfig) -> Tensor:
    """Madry et al. (2018), with the loss written out and differentiated by autograd."""
    adversarial = x.clone()
    for _ in range(config.steps):
        adversarial = adversarial.detach().requires_grad_()
        F.cross_entropy(model(adversarial), y, reduction="sum").backward()
        gradient = adversarial.grad
        assert gradient is not None
        with torch.no_grad():
            if config.norm == "linf":
                moved = adversarial + config.step_size * gradient.sign()
                adversarial = torch.minimum(torch.maximum(moved, x - config.eps), x + config.eps)
            else:
                length = gradient.square().sum((1, 2, 3), keepdim=True).sqrt()
                difference = adversarial + config.step_size * gradient / length - x
                radius = difference.square().sum((1, 2, 3), keepdim=True).sqrt()
                adversarial = x + difference * torch.clamp(config.eps / radius, max=1)
            adversarial = adversarial.clamp(0, 1)
    for p in model.parameters():
        p.grad = None
    return adversarial


def test_gradient_is_that_of_the_cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    x = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
    got, logits = input_gradient(model, images, labels)
    torch.testing.assert_close(logits, model(images))
    assert not logits.requires_grad
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    assert not images.requires_grad


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("eps", [0.03, 0.3])
def test_linf_equals_a_literal_loop(model: nn.Module, images: Tensor, labels: Tensor, steps: int, eps: float) -> None:
    config = PGDConfig(eps=eps, steps=steps)
    got, expected = pgd_attack(model, images, labels, config), literal_pgd(model, images, labels, config)
    # Where a component of the gradient is next to 0, rounding may turn its sign.
    close = (got - expected).abs() < 1e-6
    assert close.double().mean() > 0.995
    assert (got - images).abs().max() > 0.9 * eps * min(1, steps / 4)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("eps", [0.2, 2.0])
def test_l2_equals_a_literal_loop(model: nn.Module, images: Tensor, labels: Tensor, steps: int, eps: float) -> None:
    config = PGDConfig(norm="l2", eps=eps, steps=steps)
    got, expected = pgd_attack(model, images, labels, config), literal_pgd(model, images, labels, config)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got - images).flatten(1).norm(dim=1).max() > 0.9 * eps * min(1, steps / 4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_in_the_ball_and_in_the_box_and_the_loss_grows(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, start: bool, dtype: torch.dtype
) -> None:
    eps = 0.05 if norm == "linf" else 0.8
    config = PGDConfig(norm=norm, eps=eps, steps=5, random_start=start)
    before = images.clone()
    got = pgd_attack(model, images, labels, config, dtype=dtype, seed=0)
    assert torch.equal(images, before)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert got.min() >= 0 and got.max() <= 1
    difference = (got - images).flatten(1)
    size = difference.abs().amax(1) if norm == "linf" else difference.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-5) + 1e-6
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, got))
    assert (attacked > clean).all()


def test_parameters_get_no_gradients_and_nothing_else_changes(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    pgd_attack(model, images, labels, PGDConfig(steps=2))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_frozen_parameters_and_no_grad_make_no_difference(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    config = PGDConfig(norm="l2", eps=1.0, steps=3)
    expected = pgd_attack(model, images, labels, config)
    model.requires_grad_(False)
    with torch.no_grad():
        got = pgd_attack(model, images, labels, config)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("start", [False, True])
def test_channels_last_images_stay_so_and_give_the_same(
    model: nn.Module, images: Tensor, labels: Tensor, start: bool
) -> None:
    config = PGDConfig(norm="l2", eps=0.5, steps=3, random_start=start)
    wanted = pgd_attack(model, images, labels, config, seed=5)
    other = images.contiguous(memory_format=torch.channels_last)
    got = pgd_attack(model, other, labels, config, seed=5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_images_do_not_depend_on_their_batch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    config = PGDConfig(norm="l2", eps=0.5, steps=3)
    whole = pgd_attack(model, images, labels, config)
    parts = [pgd_attack(model, x, y, config) for x, y in zip(images.split(4), labels.split(4), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    config = PGDConfig(norm=norm, eps=0.25)
    images = torch.full((4000, 1, 1, 3), 0.5)
    noise = (random_start(images, torch.arange(4000), config, seed=0) - images).flatten(1) / 0.25
    if norm == "linf":
        # Of U(-1, 1): mean 0 and mean square 1/3, whatever the component.
        torch.testing.assert_close(noise.mean(0), torch.zeros(3), atol=0.05, rtol=0)
        torch.testing.assert_close(noise.square().mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
        assert noise.abs().max() <= 1 + 1e-6
    else:
        # Of a uniform point of the ball in 3 dimensions, the cube of the radius is uniform in [0, 1].
        volume = noise.norm(dim=1) ** 3
        assert volume.max() <= 1 + 1e-5
        quantiles = volume.quantile(torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.04, rtol=0)
        torch.testing.assert_close(noise.mean(0), torch.zeros(3), atol=0.05, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_belongs_to_seed_image_and_restart_and_stays_in_the_box(norm: str) -> None:
    images = torch.zeros(3, 3, 5, 5)
    images[1] = 1
    ids = torch.tensor([7, 2**40, 3])
    config = PGDConfig(norm=norm, eps=0.1)
    first = random_start(images, ids, config, seed=3, restart=1)
    assert torch.equal(random_start(images[[2, 0]], ids[[2, 0]], config, seed=3, restart=1), first[[2, 0]])
    last = images.contiguous(memory_format=torch.channels_last)
    in_graph = random_start(last, ids, config, torch.tensor(3), torch.tensor(1))
    assert torch.equal(in_graph, first)
    assert in_graph.is_contiguous(memory_format=torch.channels_last)
    for other in (
        random_start(images, ids, config, seed=4, restart=1),
        random_start(images, ids, config, seed=3),
        random_start(images, ids + 1, config, seed=3, restart=1),
    ):
        assert all(not torch.equal(a, b) for a, b in zip(other, first, strict=True))
    assert first.min() >= 0 and first.max() <= 1
    assert 0 < first[0].max() <= 0.1 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [False, True])
def test_a_window_is_all_that_changes(model: nn.Module, images: Tensor, labels: Tensor, norm: str, start: bool) -> None:
    config = PGDConfig(norm=norm, eps=1.0, steps=4, window=0.5, random_start=start)
    ids = torch.arange(9) * 3
    inside = random_windows(images, ids, 0.5, seed=7).expand_as(images)
    got = pgd_attack(model, images, labels, config, seed=7, image_ids=ids)
    changed = got != images
    assert not changed[~inside].any()
    assert changed[inside].double().mean() > 0.5
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, got))
    assert (attacked > clean).all()


@pytest.mark.parametrize(("share", "size"), [(0.125, (32, 32)), (0.5, (5, 9)), (1.0, (4, 6)), (0.01, (7, 7))])
def test_windows_are_squares_half_of_which_touch_a_border(share: float, size: tuple[int, int]) -> None:
    images = torch.zeros(6000, 3, *size)
    masks = random_windows(images, torch.arange(6000), share, seed=1)
    assert masks.shape == (6000, 1, *size) and masks.dtype == torch.bool
    side = max(1, round(share * min(size)))
    for axis in (2, 3):
        along = masks.flatten(0, 1).any(2 if axis == 2 else 1)
        assert (along.sum(1) == side).all()
        places = size[axis - 2] - side + 1
        first = along.float().argmax(1)
        seen = first.bincount(minlength=places) / 6000
        # Each inner place once in twice as many starts, the borders for all that lie beyond them.
        inner = 1 / (2 * places)
        expected = torch.full((places,), inner)
        expected[0] += inner * (places // 2)
        expected[-1] += inner * (places - places // 2)
        torch.testing.assert_close(seen, expected, atol=0.025, rtol=0)
    assert (masks.sum((1, 2, 3)) == side * side).all()


def test_a_window_belongs_to_seed_image_and_restart() -> None:
    images, ids = torch.zeros(40, 1, 32, 32), torch.arange(40) + 2**33
    first = random_windows(images, ids, 0.25, seed=3, restart=1)
    assert torch.equal(random_windows(images[5:7], ids[5:7], 0.25, torch.tensor(3), torch.tensor(1)), first[5:7])
    for other in (
        random_windows(images, ids, 0.25, seed=4, restart=1),
        random_windows(images, ids, 0.25, seed=3),
        random_windows(images, ids + 1, 0.25, seed=3, restart=1),
    ):
        assert (other != first).flatten(1).any(1).double().mean() > 0.5
