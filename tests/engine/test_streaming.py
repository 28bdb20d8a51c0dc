from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pbe_fast.engine import streaming
from pbe_fast.engine.replay import Recorder
from pbe_fast.engine.streaming import fits, stream

CPU = torch.device("cpu")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_every_batch_arrives_once_and_in_order(images: Tensor, count: int) -> None:
    batches = list(torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(6))[:count]
    got = list(stream(images, batches, CPU))
    assert len(got) == count
    assert all(torch.equal(g, images[b]) for g, b in zip(got, batches, strict=True))


def test_slices_are_batches_too_and_the_images_stay_as_they_are(images: Tensor) -> None:
    before = images.clone()
    first, last = stream(images, [slice(0, 32), slice(32, 64)], CPU)
    first.zero_()
    assert torch.equal(last, images[32:])
    assert torch.equal(images, before)


def test_batches_are_asked_for_a_little_ahead_and_read_by_another_thread(images: Tensor) -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i in range(10):
            asked.append(i)
            yield torch.tensor([i])

    sent = stream(images, batches(), CPU)
    before = threading.active_count()
    next(sent)
    assert asked == [0, 1, 2]
    assert threading.active_count() == before + 1
    sent.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_next_batch_is_sent_while_one_is_worked_on(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered, sent = streaming._gathered, threading.Semaphore(0)

    class Watched:
        def __init__(self, staged: Tensor) -> None:
            self.staged = staged

        def to(self, device: torch.device) -> Tensor:
            sent.release()
            return self.staged

    def watched(images: Tensor, batch: Tensor, *, pinned: bool) -> Watched:
        return Watched(gathered(images, batch, pinned=pinned))

    monkeypatch.setattr(streaming, "_gathered", watched)
    batches = stream(images, torch.arange(50).split(10), CPU)
    next(batches)
    # The first one, and both that follow, without the second being asked for.
    assert all(sent.acquire(timeout=10) for _ in range(3))
    assert not sent.acquire(timeout=0.05)
    next(batches)
    assert sent.acquire(timeout=10)


def test_nothing_is_sent_on_a_stream_that_graphs_are_captured_on(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch hands out the same 32 streams again and again, but others for another priority.
    asked: list[int] = []

    def noted(device: torch.device, priority: int = 0) -> None:
        asked.append(priority)
        raise LookupError("no stream here")

    monkeypatch.setattr(torch.cuda, "Stream", noted)
    with pytest.raises(LookupError, match="no stream here"):
        next(stream(images, [torch.arange(3)], torch.device("cuda")))
    with pytest.raises(LookupError, match="no stream here"):
        Recorder(torch.device("cuda"))._side_stream()
    assert asked[0] < 0 == asked[1]


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu(images: Tensor) -> None:
    batches = list(torch.arange(50).split(3))
    for got, batch in zip(stream(images, batches, torch.device("cuda")), batches, strict=True):
        torch.cuda._sleep(1_000_000)
        assert torch.equal(got.cpu(), images[batch])


def test_an_index_that_is_not_there_is_an_error(images: Tensor) -> None:
    with pytest.raises(IndexError):
        list(stream(images, [torch.tensor([50])], CPU))


def test_a_memory_map_is_read_batch_by_batch(images: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    batches = list(torch.arange(50).flip(0).split(7))
    assert all(torch.equal(g, images[b]) for g, b in zip(stream(mapped, batches, CPU), batches, strict=True))


def test_the_limit_decides_what_rests_on_the_device(images: Tensor) -> None:
    assert fits(images, CPU)
    assert fits(images, CPU, images.numel())
    assert not fits(images, CPU, images.numel() - 1)


@pytest.mark.parametrize(("free", "reserved", "allocated"), [(6000, 0, 0), (1000, 7000, 2000), (0, 6000, 0)])
def test_half_of_what_is_free_on_a_gpu_is_the_limit(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert images.numel() == 3000
    assert fits(images, torch.device("cuda"))
    assert not fits(torch.cat([images, images[:1]]), torch.device("cuda"))
