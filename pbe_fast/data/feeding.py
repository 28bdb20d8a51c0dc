"""Batches for training, in fixed buffers on the device: drawn pass by pass, gathered and moved there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pbe_fast.data.augment import draw_moves, move
from pbe_fast.data.image_set import ImageSet
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.streaming import stream


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: which images, (n,) int64, and how each is moved, (n, 3); if streamed, also their labels and pixels."""

    ids: Tensor
    moves: Tensor
    labels: Tensor | None = None
    pixels: Tensor | None = None


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in one pass over n images."""
    return math.ceil(n / batch_size)


def balanced_batches(
    n: int, batch_size: int, generator: torch.Generator, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """A random order of 0..n-1 in batches whose sizes differ by at most one: no small last batch upsets BN.

    The generator is on the CPU; the order is sent to ``device`` as a whole.
    """
    yield from torch.randperm(n, generator=generator).to(device).tensor_split(steps_per_epoch(n, batch_size))


def endless_batches(
    n: int, batch_size: int, generator: torch.Generator, *, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """`balanced_batches`, pass after pass."""
    while True:
        yield from balanced_batches(n, batch_size, generator, device=device)


def draw_batches(
    data: ImageSet,
    *,
    steps: int,
    batch_size: int,
    augment: str,
    generator: torch.Generator,
    device: torch.device,
    among: Tensor | None = None,
    streamed: bool = False,
) -> Iterator[Batch]:
    """Balanced batches of a random order, pass after pass, with what augmentation does to each image.

    Everything is drawn before the first batch is used, and goes to the device once per pass: what a step does is then
    fixed without the host, and the draws are the same wherever the images rest.

    Args:
        data: The images; on ``device``, unless ``streamed``.
        steps: Number of batches.
        batch_size: Images in one, at most.
        augment: As for `pbe_fast.data.augment.augment`.
        generator: On the CPU.
        device: Where the batches are wanted.
        among: int64 indices of the images to use; all, if not given.
        streamed: Gather the pixels on the host, a batch ahead, and send them, and the labels of each pass with its ids.
    """
    n = len(data) if among is None else len(among)
    per_pass = steps_per_epoch(n, batch_size)
    height = data.image_shape[1]
    passes = [
        (torch.randperm(n, generator=generator), draw_moves(n, height, augment, generator))
        for _ in range(math.ceil(steps / per_pass))
    ]

    chosen = None if among is None else among.to(data.device)

    def ids_of(order: Tensor) -> Tensor:
        order = order.to(data.device)
        return order if chosen is None else chosen[order]

    def batches() -> Iterator[Batch]:
        for order, moves in passes:
            ids = ids_of(order)
            sent = [ids, moves, data.labels[ids]] if streamed else [ids, moves]
            yield from map(Batch, *(tensor.to(device).tensor_split(per_pass) for tensor in sent))

    if not streamed:
        yield from itertools.islice(batches(), steps)
        return
    where = itertools.chain.from_iterable(ids_of(order).tensor_split(per_pass) for order, _ in passes)
    pixels = stream(data.images, itertools.islice(where, steps), device)
    for batch, of_batch in zip(itertools.islice(batches(), steps), pixels, strict=True):
        yield replace(batch, pixels=of_batch)


class Buffers:
    """The fixed tensors that a step of one batch size works on.

    Args:
        data: Where images come from.
        size: Images in a batch.
        device: Of the buffers.
        resident: Whether ``data`` rests there, so that the step itself gathers.
    """

    def __init__(self, data: ImageSet, size: int, device: torch.device, *, resident: bool) -> None:
        shape = (size, *data.image_shape)
        self._data = data if resident else None
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._moves = torch.zeros(size, 3, dtype=torch.int16, device=device)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        self.images = torch.zeros(shape, dtype=torch.float32, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self.adversarial = torch.zeros_like(self.images)

    def load(self, batch: Batch) -> None:
        """What comes from outside: indices, or images that were sent."""
        self._moves.copy_(batch.moves)
        if batch.pixels is None or batch.labels is None:
            self._ids.copy_(batch.ids)
        else:
            self._pixels.copy_(batch.pixels)
            self.labels.copy_(batch.labels)

    def fill(self, augmented: bool) -> None:
        """``images`` and ``labels`` from it: gathered, moved, as float32 in [0, 1]."""
        if self._data is not None:
            torch.index_select(self._data.images, 0, self._ids, out=self._pixels)
            torch.index_select(self._data.labels, 0, self._ids, out=self.labels)
        self.images.copy_(to_input(move(self._pixels, self._moves) if augmented else self._pixels))
