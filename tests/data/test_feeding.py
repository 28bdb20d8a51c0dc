from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pbe_fast.data import ImageSet
from pbe_fast.data.augment import draw_moves, move
from pbe_fast.data.feeding import Buffers, balanced_batches, draw_batches, endless_batches, steps_per_epoch

CPU = torch.device("cpu")
# In place of a GPU, where only it is of interest what is sent there and when.
ELSEWHERE = torch.device("meta")


class Sent(TorchDispatchMode):
    """Counts what the thread it is in sends elsewhere."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func is torch.ops.aten._to_copy.default and kwargs.get("device") == ELSEWHERE
        return func(*args, **kwargs)


@pytest.fixture
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (19, 3, 16, 12), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (19,), generator=generator), tuple("abcd"))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("augment", ["none", "crop+flip"])
def test_buffers_hold_what_plain_indexing_gives(data: ImageSet, streamed: bool, augment: str) -> None:
    seen = []
    options = {"steps": 7, "batch_size": 8, "augment": augment, "device": CPU, "streamed": streamed}
    for batch in draw_batches(data, generator=torch.Generator().manual_seed(3), **options):  # type: ignore[arg-type]
        buffers = Buffers(data, len(batch.ids), CPU, resident=not streamed)
        buffers.images.fill_(torch.nan)
        buffers.load(batch)
        buffers.fill(augment != "none")
        assert torch.equal(buffers.images, move(data.images[batch.ids], batch.moves).float() / 255)
        assert torch.equal(buffers.labels, data.labels[batch.ids])
        assert buffers.images.is_contiguous(memory_format=torch.channels_last)
        seen.append((batch.ids, batch.moves))
    # Drawn with the generator alone: the order of a pass, then how its images move.
    generator = torch.Generator().manual_seed(3)
    expected = []
    for _ in range(3):
        order, moves = torch.randperm(19, generator=generator), draw_moves(19, 16, augment, generator)
        expected += list(zip(order.tensor_split(3), moves.tensor_split(3), strict=True))
    assert len(seen) == 7
    for got, wanted in zip(seen, expected, strict=False):
        assert all(map(torch.equal, got, wanted))


def test_a_pass_among_some_images_holds_each_of_them_once(data: ImageSet) -> None:
    among = torch.tensor([3, 18, 7, 0, 11])
    batches = draw_batches(
        data, steps=4, batch_size=3, augment="none", generator=torch.Generator(), device=CPU, among=among
    )
    ids = [batch.ids.tolist() for batch in batches]
    assert [len(i) for i in ids] == [3, 2, 3, 2]
    assert sorted(ids[0] + ids[1]) == sorted(ids[2] + ids[3]) == sorted(among.tolist())


def test_all_but_the_pixels_of_a_streamed_set_is_sent_once_in_a_pass(data: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    with Sent() as sent:
        batches = list(
            draw_batches(
                data, steps=7, batch_size=4, augment="crop", generator=generator, device=ELSEWHERE, streamed=True
            )
        )
    assert len(batches) == 7
    for batch in batches:
        assert batch.labels is not None and batch.pixels is not None
        tensors = (batch.ids, batch.moves, batch.labels, batch.pixels)
        assert {tensor.device for tensor in tensors} == {ELSEWHERE}
        assert len({len(tensor) for tensor in tensors}) == 1
    # Ids, moves and labels of two passes. The pixels are sent by another thread.
    assert sent.count == 6


def test_an_order_is_sent_once_in_a_pass(data: ImageSet) -> None:
    with Sent() as sent:
        batches = list(islice(endless_batches(19, 8, torch.Generator(), device=ELSEWHERE), 6))
    assert {batch.device for batch in batches} == {ELSEWHERE}
    assert sent.count == 2


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (7, 7), (8, 7), (100, 32), (129, 128), (1000, 128)])
def test_batches_hold_every_image_once_and_differ_by_one_at_most(n: int, batch_size: int) -> None:
    batches = list(balanced_batches(n, batch_size, torch.Generator().manual_seed(0)))
    sizes = [len(b) for b in batches]
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == steps_per_epoch(n, batch_size) == -(-n // batch_size)


def test_the_order_of_the_batches_is_random_and_comes_from_the_generator() -> None:
    first, again, other = (
        torch.cat(list(balanced_batches(50, 8, torch.Generator().manual_seed(s)))).tolist() for s in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first != sorted(first)


def test_endless_batches_go_pass_after_pass_each_in_another_order() -> None:
    batches = list(islice(endless_batches(10, 4, torch.Generator().manual_seed(0)), 9))
    passes = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
