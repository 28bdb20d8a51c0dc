from __future__ import annotations

import pytest
import torch

from pbe_fast.data import ImageSet
from pbe_fast.data.augment import draw_moves, move
from pbe_fast.data.feeding import Buffers, draw_batches

CPU = torch.device("cpu")


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
