from __future__ import annotations

import copy

import pytest
import torch
from attacked import SHAPE, predictions, smooth_network
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attacker import PGD
from pbe_fast.config import PGDConfig
from pbe_fast.errors import InputError
from pbe_fast.models import Normalized, PreActResNet18
from pbe_fast.pgd import pgd_attack


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("window", [None, 0.5])
def test_equals_the_plain_loop(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, start: bool, normalised: bool, window: float | None
) -> None:
    if normalised:
        model = Normalized(model, (0.5, 0.4, 0.6), (0.3, 0.2, 0.25)).eval()
    config = PGDConfig(norm=norm, eps=0.05 if norm == "linf" else 0.8, steps=4, random_start=start, window=window)
    ids = torch.arange(9) * 5
    before = images.clone()
    expected = pgd_attack(model, images, labels, config, seed=3, image_ids=ids)
    got = PGD(model, config, image_shape=SHAPE, seed=3)(images, labels, ids)
    assert torch.equal(images, before)
    assert got.dtype == torch.float32 and got.is_contiguous() and not got.requires_grad
    if norm == "l2":
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    else:
        # Where a component of the gradient is next to 0, rounding may turn its sign.
        assert ((got - expected).abs() < 1e-5).double().mean() > 0.995


@pytest.mark.parametrize(("means", "channels"), [(1, 3), (3, 1)])
def test_means_may_be_fewer_or_more_than_the_channels(
    model: nn.Module, images: Tensor, labels: Tensor, means: int, channels: int
) -> None:
    net = Normalized(model, (0.5, 0.4, 0.6)[:means], (0.3, 0.2, 0.25)[:means]).eval()
    images = images[:, :channels].contiguous()
    config = PGDConfig(norm="l2", eps=0.5, steps=3)
    attack = PGD(net, config, image_shape=images.shape[1:])
    attack.refresh(net)
    torch.testing.assert_close(attack(images, labels), pgd_attack(net, images, labels, config), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("window", [None, 0.5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 100])
def test_the_batch_size_makes_no_difference(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, early_stop: bool, window: float | None
) -> None:
    config = PGDConfig(
        norm="l2", eps=0.5, steps=3, random_start=window is None, window=window, restarts=2, early_stop=early_stop
    )
    ids = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    whole = PGD(model, config, image_shape=SHAPE, seed=1)(images, labels, ids)
    attack = PGD(model, config, image_shape=SHAPE, seed=1, batch_size=batch_size)
    torch.testing.assert_close(attack(images, labels, ids), whole, atol=1e-5, rtol=1e-4)
    back = ids.argsort()
    torch.testing.assert_close(attack(images[back], labels[back], ids[back]), whole[back], atol=1e-5, rtol=1e-4)


def test_every_call_can_have_a_seed_of_its_own(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    config = PGDConfig(norm="l2", eps=0.5, steps=1, random_start=True)
    attack = PGD(model, config, image_shape=SHAPE, seed=1)
    ids = torch.arange(9)
    first = attack(images, labels, ids)
    assert not torch.equal(attack(images, labels, ids, seed=2**62), first)
    assert torch.equal(attack(images, labels, ids, seed=1), first)


class FixedSize:
    """What a graph and a compiled network ask for, held on a CPU: one batch size for ever."""

    def __init__(self, attack: PGD) -> None:
        self.sizes: set[int] = set()
        attack._fixed = True
        attack._copy.register_forward_pre_hook(lambda module, given: self.sizes.add(len(given[0])))


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("window", [None, 0.5])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_the_last_batch_is_padded_where_the_size_is_fixed(
    model: nn.Module, images: Tensor, labels: Tensor, count: int, early_stop: bool, window: float | None
) -> None:
    config = PGDConfig(norm="l2", eps=0.8, steps=3, early_stop=early_stop, window=window)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4)
    ids = torch.arange(9)
    attack(images, labels, ids)
    expected = PGD(model, config, image_shape=SHAPE)(images[:count], labels[:count], ids[:count])
    fixed = FixedSize(attack)
    got = attack(images[:count], labels[:count], ids[:count])
    assert fixed.sizes == {4}
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_buffers_keep_their_address(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    attack = PGD(Normalized(model, (0.5,) * 3, (0.3,) * 3), PGDConfig(), image_shape=SHAPE)
    batch = attack._batch

    def addresses() -> list[int]:
        held = (batch.images, batch.labels, batch.ids, batch.adversarial, batch.model_input, batch.fooled)
        return [t.data_ptr() for t in (*held, attack._key, attack._restart, *attack._copy.parameters())]

    before = addresses()
    attack(images, labels)
    attack.refresh(Normalized(smooth_network(), (0.5,) * 3, (0.3,) * 3))
    attack(images[:4], labels[:4])
    assert addresses() == before


def test_refresh_brings_new_weights_and_nothing_else_does(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    config = PGDConfig(norm="l2", eps=0.8, steps=3)
    attack = PGD(model, config, image_shape=SHAPE)
    first = attack(images, labels)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(-1.5)
        model.get_buffer("1.running_var").mul_(2)
    assert torch.equal(attack(images, labels), first)
    attack.refresh(model)
    expected = pgd_attack(model, images, labels, config)
    torch.testing.assert_close(attack(images, labels), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first, expected, atol=1e-3)


def test_a_model_in_training_is_attacked_as_in_eval_mode_and_left_alone(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    config = PGDConfig(norm="l2", eps=0.8, steps=3)
    expected = pgd_attack(model, images, labels, config)
    model.train()
    before = copy.deepcopy(model.state_dict())
    attack = PGD(model, config, image_shape=SHAPE)
    attack.refresh(model)
    torch.testing.assert_close(attack(images, labels), expected, atol=1e-5, rtol=1e-4)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bfloat16_attacks_as_well(norm: str) -> None:
    torch.manual_seed(0)
    model = Normalized(PreActResNet18(10, width=8), (0.5,) * 3, (0.25,) * 3).eval()
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = predictions(model, images)
    config = PGDConfig(norm=norm, eps=0.05 if norm == "linf" else 1.0, steps=4)
    exact = losses(model, pgd_attack(model, images, labels, config), labels).mean()
    got = PGD(model, config, image_shape=(3, 16, 16), dtype=torch.bfloat16)(images, labels)
    clean = losses(model, images, labels).mean()
    assert losses(model, got, labels).mean() - clean > 0.9 * (exact - clean) > 0


def test_restarts_keep_the_start_that_reaches_the_highest_loss(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    ids = torch.arange(9)
    found = {}
    for restarts in (1, 2, 5):
        config = PGDConfig(norm="l2", eps=3.0, alpha=0.4, steps=1, random_start=True, restarts=restarts)
        found[restarts] = losses(model, PGD(model, config, image_shape=SHAPE)(images, labels, ids), labels)
    assert (found[2] >= found[1] - 1e-5).all() and (found[5] >= found[2] - 1e-5).all()
    assert (found[5] > found[1] + 1e-3).sum() >= 3


@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_early_stop_leaves_an_image_where_it_is_first_misclassified(
    model: nn.Module, images: Tensor, batch_size: int
) -> None:
    labels = predictions(model, images)
    labels[2] = (labels[2] + 1) % 5
    config = PGDConfig(norm="l2", eps=2.0, steps=6, early_stop=True)
    expected = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        path = [image]
        for steps in range(1, 7):
            path.append(pgd_attack(model, image, label, PGDConfig(norm="l2", eps=2.0, steps=steps)))
        wrong = [bool(predictions(model, x) != label) for x in path[:-1]]
        expected.append(path[wrong.index(True) if True in wrong else -1])
    stops = [float((e - x).norm()) for e, x in zip(expected, images.split(1), strict=True)]
    assert stops[2] == 0 and len({round(stop, 2) for stop in stops}) >= 3
    got = PGD(model, config, image_shape=SHAPE, batch_size=batch_size)(images, labels)
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_early_stop_computes_fewer_steps(model: nn.Module, images: Tensor) -> None:
    labels = predictions(model, images)
    rows = {}
    for early_stop in (False, True):
        config = PGDConfig(norm="l2", eps=2.0, steps=8, early_stop=early_stop)
        attack = PGD(model, config, image_shape=SHAPE, batch_size=4)
        seen: list[int] = []
        attack._copy.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(len(given[0])))
        attack(images, labels)
        rows[early_stop] = sum(seen)
    assert rows[False] == 72
    assert rows[True] < 60


def test_attacks_on_one_model_share_its_copy_and_their_buffers(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    ids = torch.arange(9)
    config, patch = PGDConfig(norm="l2", eps=0.8, steps=3), PGDConfig(norm="l2", eps=0.9, steps=2, window=0.5)
    first = PGD(model, config, image_shape=SHAPE, batch_size=4)
    second = PGD(model, patch, image_shape=SHAPE, batch_size=4, beside=first)
    assert second._copy is first._copy
    held = [
        {t.data_ptr() for t in (b.images, b.adversarial, b.model_input, b.labels)}
        for b in (first._batch, second._batch)
    ]
    assert held[0] == held[1]
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(-1.5)
    for attack, options in ((second, patch), (first, config), (second, patch)):
        attack.refresh(model)
        expected = pgd_attack(model, images, labels, options, image_ids=ids)
        torch.testing.assert_close(attack(images, labels, ids), expected, atol=1e-5, rtol=1e-4)


def test_no_images_give_no_images(model: nn.Module) -> None:
    config = PGDConfig(random_start=True, restarts=2)
    none = torch.zeros(0, *SHAPE)
    got = PGD(model, config, image_shape=SHAPE)(none, torch.zeros(0, dtype=torch.int64), torch.zeros(0).long())
    assert got.shape == none.shape


def test_refusals(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(InputError, match=r"\(9, 3, 8, 5\)"):
        PGD(model, PGDConfig(), image_shape=SHAPE)(images[..., :5], labels)
    with pytest.raises(InputError, match="image_ids"):
        PGD(model, PGDConfig(random_start=True), image_shape=SHAPE)(images, labels)
    with pytest.raises(InputError, match="image_ids"):
        PGD(model, PGDConfig(window=0.5), image_shape=SHAPE)(images, labels)
