from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, installed
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast import attacker
from pbe_fast.attacker import PGD
from pbe_fast.config import PGDConfig
from pbe_fast.engine import compiling
from pbe_fast.engine.replay import Recorder
from pbe_fast.errors import InputError
from pbe_fast.models import Normalized, PreActResNet18
from pbe_fast.pgd import pgd_attack

SHAPE = (3, 8, 6)


def smooth_network() -> nn.Module:
    """Without kinks, so that the rounding of two ways to the same gradient cannot end on two sides of one."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 12, 5)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
        net.get_buffer("1.running_mean").fill_(0.2)
        net.get_buffer("1.running_var").fill_(2.0)
    return net.eval()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return installed(monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    return smooth_network()


@pytest.fixture
def images() -> Tensor:
    """Some pixels at 0 and at 1, where the box cuts the ball."""
    return (torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 5, (9,), generator=torch.Generator().manual_seed(2))


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(images), labels, reduction="none")


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)  # type: ignore[no-any-return]


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


def _eager(network: nn.Module, **options: object) -> nn.Module:
    assert options == {"dynamic": False}
    assert not any(p.requires_grad for p in network.parameters())
    return network


def test_compiling_is_chosen_by_option_or_by_the_work_that_is_left(
    model: nn.Module, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", _eager)
    worth: list[float] = []

    def asked(seconds: float, device: torch.device) -> bool:
        worth.append(seconds)
        return len(worth) > 1

    monkeypatch.setattr(attacker, "worth_compiling", asked)

    def compiles(option: str, planned: int) -> list[bool]:
        attack = PGD(model, PGDConfig(compile=option), image_shape=SHAPE, planned=planned)
        states = [attack._fixed]
        for _ in range(3):
            attack(images, labels)
            states.append(attack._fixed)
        return states

    assert compiles("off", 10**9) == [False] * 4
    assert compiles("auto", 0) == [False] * 4
    assert worth == []
    assert compiles("auto", 10**9) == [False] * 4
    assert compiles("auto", 10**9) == [False, False, True, True]
    assert len(worth) == 2 and min(worth) > 10
    assert compiles("on", 0) == [True] * 4


def test_without_a_compiler_the_attack_runs_with_one_warning(
    model: nn.Module, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(network: nn.Module, **options: object) -> nn.Module:
        def fail(x: Tensor) -> Tensor:
            raise RuntimeError("no working C++ compiler\nand more")

        return fail  # type: ignore[return-value]

    monkeypatch.setattr(torch, "compile", broken)
    config = PGDConfig(compile="on")
    with pytest.warns(RuntimeWarning, match=r"without torch\.compile: no working C\+\+ compiler$"):
        attack = PGD(model, config, image_shape=SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = attack(images, labels)
    assert torch.equal(got, PGD(model, PGDConfig(), image_shape=SHAPE)(images, labels))


def test_compiling_pays_for_hours_and_not_for_minutes() -> None:
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert not compiling.worth_compiling(60.0, device)
        assert compiling.worth_compiling(3600.0, device)
    assert not compiling.worth_compiling(1e9, torch.device("meta"))


@pytest.mark.slow
def test_the_compiled_network_gives_the_same(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    config = PGDConfig(norm="l2", eps=0.8, steps=3, compile="on")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        attack = PGD(model, config, image_shape=SHAPE, batch_size=4)
    assert attack._fixed
    expected = pgd_attack(model, images, labels, config)
    torch.testing.assert_close(attack(images, labels), expected, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(-1.5)
    attack.refresh(model)
    expected = pgd_attack(model, images, labels, config)
    torch.testing.assert_close(attack(images, labels), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("window", [None, 0.5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gpu_replays_one_graph_that_equals_the_plain_loop(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, window: float | None, start: bool
) -> None:
    model, images, labels = Normalized(model, (0.5,) * 3, (0.3,) * 3).eval().cuda(), images.cuda(), labels.cuda()
    ids = torch.arange(9, device="cuda")
    config = PGDConfig(norm=norm, eps=0.05 if norm == "linf" else 0.8, steps=4, random_start=start, window=window)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4)
    buffers = copy.deepcopy(dict(attack._copy.named_buffers()))
    for _ in range(3):
        attack(images, labels, ids)
    assert attack._run_all.captured
    assert all(torch.equal(value, buffers[name]) for name, value in attack._copy.named_buffers())
    with torch.no_grad():
        model.get_parameter("net.0.weight").mul_(-1.5)
    attack.refresh(model)
    for seed in (0, 5):
        expected = pgd_attack(model, images, labels, config, seed=seed, image_ids=ids)
        got = attack(images, labels, ids, seed=seed)
        close = (got - expected).abs() < 1e-3
        assert close.double().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("restarts", [1, 3])
def test_a_gpu_is_never_waited_for(model: nn.Module, images: Tensor, labels: Tensor, restarts: int) -> None:
    model, images, labels = model.cuda(), images.cuda(), labels.cuda()
    ids = torch.arange(9, device="cuda")
    config = PGDConfig(steps=4, random_start=True, restarts=restarts, window=0.5)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4, dtype=torch.bfloat16)
    for _ in range(3):
        attack(images, labels, ids)
    assert attack._run_all.captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        attack.refresh(model)
        attack(images, labels, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
def test_a_gpu_stops_early_in_fixed_slots(model: nn.Module, images: Tensor) -> None:
    labels = predictions(model, images)
    config = PGDConfig(norm="l2", eps=2.0, steps=6, early_stop=True)
    expected = PGD(model, config, image_shape=SHAPE)(images, labels)
    attack = PGD(model.cuda(), config, image_shape=SHAPE, batch_size=4)
    for _ in range(3):
        got = attack(images.cuda(), labels.cuda())
    assert attack._step_all.captured
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("planned", "options", "captured"),
    [
        (28, {}, False),
        (29, {}, True),
        (0, {}, True),
        (16, {"restarts": 2, "random_start": True}, True),
        (4, {"early_stop": True}, True),
    ],
)
def test_what_is_planned_tells_whether_a_graph_is_worth_it(
    model: nn.Module, cuda: FakeCuda, planned: int, options: dict[str, Any], captured: bool
) -> None:
    config = PGDConfig(steps=10, **options)
    recorder = Recorder(cuda.device)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4, planned=planned, recorder=recorder)
    step = attack._step_all if config.early_stop else attack._run_all
    for _ in range(5):
        step()
    assert step.captured == captured


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_compiling_is_decided_by_a_call_like_those_to_come(
    model: nn.Module, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, early_stop: bool, captures: bool
) -> None:
    config = PGDConfig(steps=2, early_stop=early_stop)
    attack = PGD(model, config, image_shape=SHAPE, batch_size=4, planned=10**9, recorder=Recorder(cuda.device))
    # As on a GPU; and no work is done where there is none.
    attack._fixed = True
    monkeypatch.setattr(attack, "_run", lambda batch: None if captures else cuda.ask())
    monkeypatch.setattr(attack, "_step", lambda batch: None if captures else cuda.ask())
    asked: list[tuple[int, float]] = []

    def worth(seconds: float, device: torch.device) -> bool:
        asked.append((attack._calls, seconds))
        return False

    monkeypatch.setattr(attacker, "worth_compiling", worth)
    clock = iter(range(1000))
    monkeypatch.setattr(attack, "_clock", lambda: float(next(clock)))
    images, labels = torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(8):
            attack(images, labels)
    assert attack._replay.captured == captures
    # The fourth run of the function is captured: in the second call where a call has two.
    first = 3 if early_stop else 5
    assert asked == [(first, (10**9 - first * 4) / 4)]
