"""Images that do not fit on the device: batches gathered on the host and sent ahead of their use."""

from __future__ import annotations

import numbers
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, repeat

import torch
from torch import Tensor

from pbe_fast.errors import InputError

# Batches on the way beside the one that is worked on.
_AHEAD = 2


def check_limit(limit: object) -> None:
    """Refuses a ``device_memory_limit`` that is none.

    Raises:
        InputError: Neither None nor a number of bytes, 0 or more.
    """
    number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
    if limit is not None and not (number and limit >= 0):  # type: ignore[operator]
        raise InputError("device_memory_limit", got=repr(limit), accepted="bytes, 0 or more, or None")


def fits(images: Tensor, device: torch.device, limit: int | None = None) -> bool:
    """Whether images are to rest on ``device`` rather than being streamed to it.

    Args:
        images: Any tensor, also one over a memory map.
        device: Where the work is done.
        limit: Bytes that images may take there. If None, half of a GPU's free memory; on a CPU there is no limit, since
            the images are in its memory (or in a file that the system pages) already.
    """
    size = images.numel() * images.element_size()
    if limit is None:
        if device.type != "cuda":
            return True
        # What torch keeps of memory that was freed counts as taken with the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = (torch.cuda.mem_get_info(device)[0] + kept) // 2
    return size <= limit


def stream(images: Tensor, batches: Iterable[Tensor | slice], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch on ``device``, in order, while the next ones are gathered and sent.

    A thread of its own reads (a memory map's pages with it) into pinned memory where the device is a GPU, and sends, on
    a stream of its own. At most two batches are on the way.

    Args:
        images: (N, ...) on the CPU.
        batches: Indices (n,) int64 on the CPU, or slices. Taken one ahead of the batch that is yielded.
        device: Where to.

    Yields:
        (n, ...) of the same dtype.
    """
    # Of high priority: no graph is captured on one of those, which would take in what is sent there in the meantime.
    side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def send(batch: Tensor | slice) -> tuple[Tensor, torch.cuda.Event | None]:
        if side is None:
            return _gathered(images, batch, pinned=False).to(device), None
        with torch.cuda.stream(side):
            # torch's cache of pinned memory keeps a block until the copy out of it is done.
            sent = _gathered(images, batch, pinned=True).to(device, non_blocking=True)
            return sent, side.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="pbe_fast.stream") as reader:
        ahead: deque[Future[tuple[Tensor, torch.cuda.Event | None]]] = deque()
        for batch in chain(batches, repeat(None)):
            if batch is not None:
                ahead.append(reader.submit(send, batch))
                if len(ahead) <= _AHEAD:
                    continue
            if not ahead:
                return
            yield _arrived(*ahead.popleft().result(), device)


def _gathered(images: Tensor, batch: Tensor | slice, *, pinned: bool) -> Tensor:
    source = images[batch] if isinstance(batch, slice) else images
    count = len(source) if isinstance(batch, slice) else len(batch)
    staged = torch.empty((count, *images.shape[1:]), dtype=images.dtype, pin_memory=pinned)
    if isinstance(batch, slice):
        return staged.copy_(source)
    return torch.index_select(source, 0, batch, out=staged)


def _arrived(images: Tensor, sent: torch.cuda.Event | None, device: torch.device) -> Tensor:
    if sent is not None:
        # For this batch alone: the next one may be on its way on the same stream.
        current = torch.cuda.current_stream(device)
        current.wait_event(sent)
        images.record_stream(current)
    return images
