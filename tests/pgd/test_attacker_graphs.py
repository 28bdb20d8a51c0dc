"""When the attack is compiled or captured as a graph, and what a GPU does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from attacked import SHAPE, predictions
from fake_cuda import FakeCuda, installed
from torch import Tensor, nn

from pbe_fast import attacker
from pbe_fast.attacker import PGD
from pbe_fast.config import PGDConfig
from pbe_fast.engine import compiling
from pbe_fast.engine.replay import Recorder
from pbe_fast.models import Normalized
from pbe_fast.pgd import pgd_attack


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return installed(monkeypatch)


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
    # Not where oneDNN does what the compiler would, and more; only when told to.
    monkeypatch.setattr(attacker.FrozenCopy, "has_post_ops", property(lambda self: True))
    assert compiles("auto", 10**9) == [False] * 4
    assert len(worth) == 2
    assert compiles("on", 0) == [True] * 4


def test_batches_are_cut_for_the_caches_where_no_amx_multiplies(
    model: nn.Module, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversarial = []
    for post_ops, rows in ((False, 64 * torch.get_num_threads()), (True, 9000)):
        monkeypatch.setattr(attacker.FrozenCopy, "has_post_ops", property(lambda self, has=post_ops: has))
        attack = PGD(model, PGDConfig(), image_shape=SHAPE, batch_size=9000)
        assert len(attack._batch) == rows
        adversarial.append(attack(images, labels))
    torch.testing.assert_close(*adversarial)


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
