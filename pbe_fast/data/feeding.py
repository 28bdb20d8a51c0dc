"""Batches for training, in fixed buffers on the device: drawn pass by pass, gathered and moved there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pbe_fast.data.augment import draw_moves, move
from pbe_fast.data.image_set import ImageSet
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.streaming import stream


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: which images, (n,) int64, and how each is moved, (n, 3); ``pixels`` where they were sent."""

    ids: Tensor
    moves: Tensor
    pixels: Tensor | None = None


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in one pass over n images."""
    return math.ceil(n / batch_size)


def balanced_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random order of 0..n-1 in batches whose sizes differ by at most one: no small last batch upsets BN."""
    yield from torch.randperm(n, generator=generator).tensor_split(steps_per_epoch(n, batch_size))


def endless_batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`balanced_batches`, pass after pass."""
    while True:
        yield from balanced_batches(n, batch_size, generator)


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
        device: Where ``moves``, and ``pixels`` of a streamed set, are wanted.
        among: int64 indices of the images to use; all, if not given.
        streamed: Gather the pixels on the host, a batch ahead, and send them; ``ids`` then stay on the host.
    """
    n = len(data) if among is None else len(among)
    per_pass = steps_per_epoch(n, batch_size)
    height = data.image_shape[1]
    passes = [
        (torch.randperm(n, generator=generator), draw_moves(n, height, augment, generator))
        for _ in range(math.ceil(steps / per_pass))
    ]

    def batches(home: torch.device) -> Iterator[Batch]:
        chosen = None if among is None else among.to(home)
        for number, (order, moves) in enumerate(passes):
            ids = order.to(home) if chosen is None else chosen[order.to(home)]
            parts = zip(ids.tensor_split(per_pass), moves.to(device).tensor_split(per_pass), strict=True)
            for _, (i, m) in zip(range(steps - number * per_pass), parts, strict=False):
                yield Batch(i, m)

    if not streamed:
        yield from batches(device)
        return
    host = data.device
    sent = stream(data.images, (batch.ids for batch in batches(host)), device)
    for batch, pixels in zip(batches(host), sent, strict=True):
        yield Batch(batch.ids, batch.moves, pixels)


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
        self._labels_at_rest = data.labels
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._moves = torch.zeros(size, 3, dtype=torch.int16, device=device)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        self.images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.adversarial = torch.zeros_like(self.images)

    def load(self, batch: Batch) -> None:
        """What comes from outside: indices, or images that were sent."""
        self._moves.copy_(batch.moves)
        if batch.pixels is None:
            self._ids.copy_(batch.ids)
        else:
            self._pixels.copy_(batch.pixels)
            self.labels.copy_(self._labels_at_rest[batch.ids])

    def fill(self, augmented: bool) -> None:
        """``images`` and ``labels`` from it: gathered, moved, as float32 in [0, 1]."""
        if self._data is not None:
            torch.index_select(self._data.images, 0, self._ids, out=self._pixels)
            torch.index_select(self._data.labels, 0, self._ids, out=self.labels)
        self.images.copy_(to_input(move(self._pixels, self._moves) if augmented else self._pixels))
