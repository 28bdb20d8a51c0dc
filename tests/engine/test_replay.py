from __future__ import annotations

import copy

import pytest
import torch
from fake_cuda import STREAMS, FakeCuda, installed
from torch import nn

from pbe_fast.config import FineTuneConfig, PGDConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.replay import Recorder, Replay
from pbe_fast.finetune import FineTuner


def test_on_the_cpu_every_call_runs_the_function() -> None:
    counter = torch.zeros(())
    step = Replay(lambda: torch._foreach_add_([counter], 1), Recorder(torch.device("cpu")))
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
    step = Replay(lambda: ran.append(cuda.current), Recorder(cuda.device))
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
    step = Replay(function, Recorder(cuda.device))
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


def test_a_capture_that_fails_but_ends_leaves_the_graphs_of_its_owner_alone(cuda: FakeCuda) -> None:
    def exhausted() -> None:
        if cuda.capturing is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    owner = Recorder(cuda.device)
    good = _called(Replay(_nothing, owner, kind="attack"))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: CUDA out of memory"):
        _called(Replay(exhausted, owner, kind="update"))
    # A workspace that went with the failed graph would be that of the good one, too.
    good()
    later = _called(Replay(_nothing, owner, kind="gathering"))
    assert good.captured and later.captured
    first, failed, last = cuda.captured
    assert first.pool == failed.pool != last.pool
    del good, later, owner
    assert not any(graph.alive for graph in cuda.captured)
    assert not any(cuda.references.values())


def _nothing() -> None:
    pass


def _called(step: Replay, times: int = 6) -> Replay:
    for _ in range(times):
        step()
    return step


def test_what_one_owner_records_shares_memory_and_a_stream_and_no_two_owners_do(cuda: FakeCuda) -> None:
    owners = [Recorder(cuda.device) for _ in range(3)]
    steps = [_called(Replay(_nothing, owner)) for owner in owners for _ in range(2)]
    assert all(step.captured for step in steps)
    for first, second in zip(cuda.captured[0::2], cuda.captured[1::2], strict=True):
        assert (first.stream, first.pool) == (second.stream, second.pool)
    assert len({graph.stream for graph in cuda.captured}) == len({graph.pool for graph in cuda.captured}) == 3


def test_owners_that_come_and_go_leave_the_stream_of_one_that_stays_alone(cuda: FakeCuda) -> None:
    stays = _called(Replay(_nothing, Recorder(cuda.device)))
    for _ in range(2 * STREAMS):
        _called(Replay(_nothing, Recorder(cuda.device)))
        stays()
    # More owners at a time than there are streams are no error.
    assert len([_called(Replay(_nothing, Recorder(cuda.device))) for _ in range(STREAMS)]) == STREAMS


def test_a_graph_that_is_dropped_goes_when_all_of_its_owner_go(cuda: FakeCuda) -> None:
    owner = Recorder(cuda.device)
    dropped, kept = (_called(Replay(_nothing, owner)) for _ in range(2))
    del dropped
    kept()
    assert all(graph.alive for graph in cuda.captured)
    del kept, owner
    assert not any(graph.alive for graph in cuda.captured)
    assert not any(cuda.references.values())


def test_after_one_that_cannot_be_captured_no_other_of_its_kind_is_tried(cuda: FakeCuda) -> None:
    owner = Recorder(cuda.device)
    kinds = ("update", "update", "attack")
    functions = (cuda.ask, cuda.ask, _nothing)
    steps = [Replay(function, owner, kind=kind) for function, kind in zip(functions, kinds, strict=True)]
    with pytest.warns(RuntimeWarning, match="without a CUDA graph") as said:
        for _ in range(6):
            for step in steps:
                step()
    assert len(said) == 1
    assert [step.captured for step in steps] == [False, False, True]
    assert len(cuda.captured) == 2
    # The pool of the capture that failed, which no graph holds, is not asked for again.
    assert cuda.captured[0].pool != cuda.captured[1].pool


def test_few_calls_are_not_worth_a_graph_until_there_are_more_of_them(cuda: FakeCuda) -> None:
    ran: list[object] = []
    caller = cuda.current
    step = Replay(lambda: ran.append(cuda.current), Recorder(cuda.device), expected=7)
    _called(step, 7)
    assert ran == [caller] * 7
    assert (cuda.streams, cuda.captured) == (0, [])
    _called(step, 5)
    assert step.captured
    assert len(ran) == 11 and cuda.captured[0].replayed == 2
    assert _called(Replay(_nothing, Recorder(cuda.device), expected=8), 4).captured


def test_nothing_of_cuda_is_touched_on_a_cpu(cuda: FakeCuda) -> None:
    _called(Replay(_nothing, Recorder(torch.device("cpu"))))
    assert (cuda.streams, cuda.pools, cuda.captured) == (0, 0, [])


def test_a_fine_tuner_goes_on_with_what_is_still_valid_of_its_graphs(cuda: FakeCuda) -> None:
    tuner = _tuner(_network(), teacher=_network().eval(), distill_weight=0.5)
    tuner._recorder = Recorder(cuda.device)
    first, other = _set(), _set()
    tuner.run(first, steps=12)
    tuner.run(first, steps=12, attack=PGDConfig(steps=1))
    with_teacher = list(cuda.captured)
    tuner.restart(total_steps=60)
    tuner.run(first, steps=12)
    tuner.run(other, steps=12)
    tuner.run(other, steps=12, attack=PGDConfig(steps=1))
    later = cuda.captured[len(with_teacher) :]
    # An update; with an attack, what comes before it and after it.
    assert (len(with_teacher), len(later)) == (3, 4)
    assert len({(graph.stream, graph.pool) for graph in cuda.captured}) == 1
    # Those dropped, of the teacher and of the first set, would have taken the others' workspace with them.
    assert all(graph.alive and graph.replayed for graph in cuda.captured)
    del tuner
    assert not any(graph.alive for graph in cuda.captured)


@pytest.mark.gpu
def test_a_graph_does_what_its_function_does_without_losing_a_call() -> None:
    counter = torch.zeros((), device="cuda")

    def function() -> None:
        counter.add_(1)

    step = Replay(function, Recorder(counter.device))
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

    step = Replay(function, Recorder(counter.device))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        for _ in range(6):
            step()
    assert counter == 6
    assert not step.captured


def _tuner(model: nn.Module, *, distill_weight: float = 0.0, **options: object) -> FineTuner:
    config = FineTuneConfig(lr=0.05, batch_size=8, augment="crop+flip", distill_weight=distill_weight)
    generator = torch.Generator().manual_seed(0)
    return FineTuner(model, config, total_steps=60, generator=generator, **options)  # type: ignore[arg-type]


def _set() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (64,), generator=generator), tuple("abcd"))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
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
