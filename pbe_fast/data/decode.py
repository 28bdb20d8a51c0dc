"""Decoding many images in parallel into one uint8 tensor."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbe_fast.engine.machine import usable_cores
from pbe_fast.engine.progress import progress as progress_bar
from pbe_fast.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Pixels = NDArray[np.uint8]

CHUNK = 256
MAX_THREADS = 16
GREY_MODES = ("L", "LA", "La", "1")
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV")


def decode(encoded: bytes | Path, size: tuple[int, int] | None = None) -> Pixels:
    """One encoded image (the bytes of a file, or its path) as (C, H, W) uint8; see `pixels_of`."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        return pixels_of(image, size)


def pixels_of(image: Image, size: tuple[int, int] | None = None) -> Pixels:
    """A Pillow image as (C, H, W) uint8: C of 1 where it is greyscale, else 3.

    Transparency is dropped. The pixels stay in stored order: an EXIF orientation is not applied.

    Args:
        image: Of any mode with 8 bits a channel or fewer.
        size: (H, W) to resize to: bilinear, antialiased when it shrinks the image.

    Raises:
        ValueError: A mode with more than 8 bits a channel, which cannot become uint8 without a choice of scale.
        OSError: An image that does not decode.
    """
    from PIL.Image import Resampling

    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(f"image mode {image.mode} has more than 8 bits a channel; save it with 8 bits first")
    wanted = "L" if image.mode in GREY_MODES else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def chunked(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """``items`` in runs of `CHUNK`, the unit of work of one thread."""
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def gather(
    chunks: Iterable[Sequence[T]],
    count: int,
    read: Callable[[T], Pixels],
    where: Callable[[int], str],
    *,
    progress: bool,
    parallel: bool = True,
) -> Tensor:
    """Read ``count`` images into one tensor.

    Args:
        chunks: The items, in runs of any length; drawn as they are needed, so that a large file is never whole in
            memory.
        count: Number of items in all chunks together, at least 1.
        read: One item to (C, H, W) uint8 pixels.
        where: Says where item i came from, for the message.
        progress: Whether to show a bar once it takes over two seconds.
        parallel: False to read in the caller's thread, for sources that are not known to be safe in several.

    Returns:
        (count, C, H, W) uint8. C is 1 where every image is greyscale; otherwise 3, with the grey ones repeated.

    Raises:
        InputError: An image that does not decode, or images of different sizes, naming the first such item.
    """
    threads = min(usable_cores(), MAX_THREADS)
    store: _Store[T] | None = None
    start = 0
    pending: deque[Future[int]] = deque()
    with (
        progress_bar(range(count), desc="reading images", enabled=progress) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for chunk in chunks:
                store = store or _Store(count, chunk[0], read, where)
                if parallel:
                    pending.append(pool.submit(store.fill, start, chunk))
                else:
                    bar.update(store.fill(start, chunk))
                start += len(chunk)
                # Taking the results in order makes the error the first one, whichever thread was faster.
                while len(pending) > 2 * threads:
                    bar.update(pending.popleft().result())
            while pending:
                bar.update(pending.popleft().result())
        except BaseException:
            for future in pending:
                future.cancel()
            raise
    if store is None or start != count:
        raise InputError("number of images", got=start, accepted=f"{count}, as the labels have it")
    return store.tensor()


class _Store(Generic[T]):
    """The pixels being gathered: three channels wide until it is known that one is enough."""

    def __init__(self, count: int, first: T, read: Callable[[T], Pixels], where: Callable[[int], str]) -> None:
        self._read = read
        self._where = where
        self._size = self._pixels(0, first).shape[1:]
        self._images = np.empty((count, 3, *self._size), dtype=np.uint8)
        self._grey = np.zeros(count, dtype=np.bool_)

    def fill(self, start: int, items: Sequence[T]) -> int:
        """Read ``items`` into the places from ``start`` on; returns how many they were."""
        for i, item in enumerate(items, start):
            pixels = self._pixels(i, item)
            if pixels.shape[1:] != self._size:
                raise InputError(
                    "images of different sizes",
                    got=f"{_size(self._size)} at {self._where(0)} and {_size(pixels.shape[1:])} at {self._where(i)}",
                    accepted="images of one size, or pbe_fast.as_image_set(data, size=(height, width)), which resizes "
                    "them all (--image-size PIXELS)",
                )
            self._images[i] = pixels
            self._grey[i] = pixels.shape[0] == 1
        return len(items)

    def tensor(self) -> Tensor:
        """All the pixels, (N, C, H, W)."""
        images = torch.from_numpy(self._images)
        return images[:, :1].clone() if self._grey.all() else images

    def _pixels(self, i: int, item: T) -> Pixels:
        try:
            return self._read(item)
        except InputError:
            raise
        except Exception as error:  # Pillow's plugins let struct, zlib and other errors through on damaged files.
            raise InputError(
                f"an image that does not decode: {self._where(i)}",
                got=f"{type(error).__name__}: {error}",
                accepted="an image with 8 bits a channel in a format that Pillow reads",
            ) from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} (height x width)"
