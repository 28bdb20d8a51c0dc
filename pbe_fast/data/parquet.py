"""Parquet in the layout that Hugging Face `datasets` writes for an image-classification set.

A struct column {bytes: an encoded image, path: its name}, an integer column of labels, and the class names in the
schema's ``huggingface`` metadata (``ClassLabel.names``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pbe_fast.data.decode import CHUNK, decode, gather
from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.reader import ReadOptions, as_path, resolve_class_names
from pbe_fast.errors import InputError

# The usual names, in order of preference (CIFAR-100 has fine_label and coarse_label side by side).
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
LAYOUT = "a struct column 'image' {bytes, path} and an integer column 'label'"


def accepts(source: Any) -> bool:
    """Whether ``source`` is the path of a Parquet file."""
    path = as_path(source)
    return path is not None and path.suffix.lower() in (".parquet", ".pq")


def read(source: Any, options: ReadOptions) -> ImageSet:
    """The image set of one Parquet file; the labels are checked before the first image is decoded.

    Args:
        source: The path of the file.
        options: See `ReadOptions`.

    Raises:
        InputError: A missing or damaged file, other columns, a null or out-of-range label, an image that does not
            decode (naming the row).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError("no such file", got=str(path), accepted="the path of a Parquet file")

    def where(row: int) -> str:
        return f"row {row} of {path}"

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_column, label_column = _image_column(schema, path), _label_column(schema, path)
            labels = _labels(file.read(columns=[label_column]).column(0), where)
            names = resolve_class_names(labels, _class_names(schema.metadata, label_column), options, where)
            images = gather(
                _encoded_chunks(file, image_column, where),
                len(labels),
                lambda encoded: decode(encoded, options.size),
                where,
                progress=options.progress,
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"a Parquet file that cannot be read: {path}", got=str(error), accepted=f"Parquet with {LAYOUT}"
        ) from error
    return ImageSet(images, labels, names, name=options.name or path.stem)


def _image_column(schema: Any, path: Path) -> str:
    import pyarrow as pa

    fits = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    return _choose(fits, IMAGE_COLUMNS, schema, f"image column of {path}", "one struct column {bytes, path}")


def _label_column(schema: Any, path: Path) -> str:
    import pyarrow as pa

    fits = [f.name for f in schema if pa.types.is_integer(f.type)]
    return _choose(fits, LABEL_COLUMNS, schema, f"label column of {path}", "one integer column")


def _choose(fits: Sequence[str], usual: Sequence[str], schema: Any, what: str, needed: str) -> str:
    named = [name for name in usual if name in fits] or (list(fits) if len(fits) == 1 else [])
    if not named:
        columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise InputError(what, got=f"columns {columns}", accepted=f"{needed}, best named {' or '.join(usual)}")
    return named[0]


def _labels(column: Any, where: Callable[[int], str]) -> torch.Tensor:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise InputError("a label that is missing", got=f"null at {where(row)}", accepted="a whole number per image")
    values = column.to_pylist()
    largest = max(values, default=0)
    if largest > torch.iinfo(torch.int64).max:
        row = values.index(largest)
        raise InputError("labels out of range", got=f"label {largest} at {where(row)}", accepted="int64")
    return torch.as_tensor(values, dtype=torch.int64)


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str) -> list[str] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None  # Files that other programs write have no such metadata; their classes are numbers.
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _encoded_chunks(file: Any, column: str, where: Callable[[int], str]) -> Iterator[list[bytes]]:
    start = 0
    for batch in file.iter_batches(batch_size=CHUNK, columns=[f"{column}.bytes"]):
        encoded = batch.column(0).flatten()[0].to_pylist()
        if None in encoded:
            row = start + encoded.index(None)
            raise InputError(
                "an image without its bytes", got=f"null at {where(row)}", accepted="the encoded image in every row"
            )
        yield encoded
        start += len(encoded)
