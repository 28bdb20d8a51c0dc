"""Images that do not fit on the device: batches gathered on the host and sent ahead of their use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import torch
from torch import Tensor


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
        limit = torch.cuda.mem_get_info(device)[0] // 2
    return size <= limit


def stream(images: Tensor, batches: Iterable[Tensor | slice], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch on ``device``, in order, while the next one is gathered and sent.

    A thread of its own reads (a memory map's pages with it) into pinned memory where the device is a GPU; the copy runs
    on a stream of its own. At most two batches are on the way.

    Args:
        images: (N, ...) on the CPU.
        batches: Indices (n,) int64 on the CPU, or slices. Taken one ahead of the batch that is yielded.
        device: Where to.

    Yields:
        (n, ...) of the same dtype.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def gather(batch: Tensor | slice) -> Tensor:
        source = images[batch] if isinstance(batch, slice) else images
        count = len(source) if isinstance(batch, slice) else len(batch)
        # torch's cache of pinned memory keeps a block until the copy out of it is done.
        staged = torch.empty((count, *images.shape[1:]), dtype=images.dtype, pin_memory=side is not None)
        if isinstance(batch, slice):
            return staged.copy_(source)
        return torch.index_select(source, 0, batch, out=staged)

    with ThreadPoolExecutor(1, thread_name_prefix="pbe_fast.stream") as reader:
        waiting: Tensor | None = None
        pending = None
        for batch in chain(batches, repeat(None)):
            following = None if batch is None else reader.submit(gather, batch)
            if waiting is not None:
                yield _arrived(waiting, side)
            waiting = None if pending is None else _sent(pending.result(), device, side)
            pending = following
            if waiting is None and pending is None:
                return


def _sent(staged: Tensor, device: torch.device, side: torch.cuda.Stream | None) -> Tensor:
    if side is None:
        return staged.to(device)
    with torch.cuda.stream(side):
        return staged.to(device, non_blocking=True)


def _arrived(images: Tensor, side: torch.cuda.Stream | None) -> Tensor:
    if side is not None:
        current = torch.cuda.current_stream(images.device)
        current.wait_stream(side)
        images.record_stream(current)
    return images
