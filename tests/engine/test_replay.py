from __future__ import annotations

import copy

import pytest
import torch
from fake_cuda import FakeCuda, installed
from torch import nn

from pbe_fast.config import FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.replay import Replay
from pbe_fast.finetune import FineTuner


def test_on_the_cpu_every_call_runs_the_function() -> None:
    counter = torch.zeros(())
    step = Replay(lambda: torch._foreach_add_([counter], 1), torch.device("cpu"))
    for _ in range(6):
        step()
    assert counter == 6
    assert not step.captured


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return installed(monkeypatch)


def test_the_fourth_call_captures_and_the_later_ones_replay(cuda: FakeCuda) -> None:
    ran: list[object] = []
    caller = cuda.current
    step = Replay(lambda: ran.append(cuda.current), cuda.device)
    for _ in range(6):
        step()
        assert cuda.current is caller
    (graph,) = cuda.captured
    # The warm-up and the capture on one stream.
    assert ran == [graph.stream] * 4
    assert graph.replayed == 3
    assert step.captured


@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_capture_that_fails_leaves_nothing_behind(cuda: FakeCuda, when: str) -> None:
    caller, ran = cuda.current, 0

    def begins() -> None:
        raise torch.AcceleratorError("CUDA error: the stream cannot be captured")

    def function() -> None:
        nonlocal ran
        if when == "end":
            cuda.ask()
        ran += 1

    if when == "begin":
        cuda.fails = begins
    step = Replay(function, cuda.device)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: CUDA error") as said:
        for _ in range(6):
            step()
            assert cuda.current is caller
    assert len(said) == 1
    assert ran == 6
    assert not step.captured
    # Nor does the allocator take a capture to be under way, or a pool to be in use.
    assert cuda.underway == []
    assert not any(cuda.references.values())


@pytest.mark.gpu
def test_a_graph_does_what_its_function_does_without_losing_a_call() -> None:
    counter = torch.zeros((), device="cuda")

    def function() -> None:
        counter.add_(1)

    step = Replay(function, counter.device)
    for calls in range(1, 9):
        step()
        assert counter == calls
    assert step.captured


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is() -> None:
    counter = torch.zeros((), device="cuda")

    def function() -> None:
        counter.add_(1)
        counter.item()

    step = Replay(function, counter.device)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        for _ in range(6):
            step()
    assert counter == 6
    assert not step.captured


def _tuner(model: nn.Module, **options: object) -> FineTuner:
    config = FineTuneConfig(lr=0.05, batch_size=8, augment="crop+flip", distill_weight=0.0)
    generator = torch.Generator().manual_seed(0)
    return FineTuner(model, config, total_steps=20, generator=generator, **options)  # type: ignore[arg-type]


def _set() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (64,), generator=generator), tuple("abcd"))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


@pytest.mark.gpu
def test_the_captured_training_step_equals_the_one_on_the_cpu() -> None:
    on_cpu, on_gpu = _network(), _network().cuda()
    expected = _tuner(on_cpu).run(_set(), steps=12)
    tuner = _tuner(on_gpu)
    got = tuner.run(_set().to("cuda"), steps=12)
    assert all(step.update.captured for step in tuner._recorded.values())
    assert got == pytest.approx(expected, rel=1e-3)
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, atol=1e-3, rtol=1e-2, msg=name)


@pytest.mark.gpu
def test_a_captured_training_step_waits_for_nothing() -> None:
    model, data = _network().cuda(), _set().to("cuda")
    tuner = _tuner(copy.deepcopy(model), dtype=torch.bfloat16)
    tuner.run(data, steps=8)
    (step,) = tuner._recorded.values()
    assert step.update.captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
