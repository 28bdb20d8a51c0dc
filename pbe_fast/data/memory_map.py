"""Arrays left in their file and paged in as they are read: what is larger than the memory, or than the device."""

from __future__ import annotations

import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From here on reading an .npz whole costs more, in time and memory, than what checking every byte of it is worth.
MAP_FROM_BYTES = 1 << 30


def map_member(path: Path, name: str) -> NDArray[Any] | None:
    """Array ``name`` of an uncompressed ``.npz`` as a private (copy-on-write) memory map.

    Returns:
        None for what cannot be mapped: a compressed member, Python objects, or columns first.

    Raises:
        KeyError: There is no such array.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        # The sizes of name and extra field stand in the member's own header, and may differ from the directory's.
        file.seek(member.header_offset)
        name_size, extra_size = struct.unpack("<26xHH", file.read(30))
        file.seek(name_size + extra_size, 1)
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            return None
        shape, columns_first, dtype = read_header(file)
        if columns_first or dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype=dtype, mode="c", offset=file.tell(), shape=shape)


def writable_map(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only map of a whole file's array as a private one, which torch takes as it is; anything else unchanged."""
    base: object = array.base
    if not isinstance(array, np.memmap) or array.flags.writeable or not isinstance(base, mmap.mmap):
        return array
    if not array.flags.c_contiguous:
        return array
    path: Any = array.filename
    return np.memmap(path, dtype=array.dtype, mode="c", offset=array.offset, shape=array.shape)
