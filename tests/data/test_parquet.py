from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pbe_fast.data import as_image_set
from pbe_fast.data.decode import CHUNK
from pbe_fast.errors import InputError


def _encode(pixels: np.ndarray, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


def _write(
    path: Path, images: Sequence[bytes | None], labels: Sequence[Any], names: Sequence[str] | None = None, **rename: str
) -> Path:
    image, label = rename.get("image", "image"), rename.get("label", "label")
    rows = [{"bytes": encoded, "path": f"{i}.png"} for i, encoded in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=100)
    return path


def _noise(n: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_lossless_images_come_back_bit_for_bit_in_order(tmp_path: Path) -> None:
    count = 2 * CHUNK + 63  # more than two units of work, and no whole number of them
    pixels = _noise(count, (5, 7, 3))
    labels = np.random.default_rng(1).integers(0, 3, count).tolist()
    file = _write(tmp_path / "birds.parquet", [_encode(p) for p in pixels], labels, ["owl", "rook", "wren"])
    data = as_image_set(str(file), progress=False)
    assert np.array_equal(data.images.numpy(), pixels.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == labels
    assert data.class_names == ("owl", "rook", "wren")
    assert data.name == "birds"


def test_greyscale_alone_stays_greyscale(tmp_path: Path) -> None:
    pixels = _noise(3, (4, 4))
    data = as_image_set(_write(tmp_path / "a.parquet", [_encode(p) for p in pixels], [0, 1, 0]))
    assert np.array_equal(data.images.numpy(), pixels[:, None])
    assert data.images.is_contiguous()
    assert data.class_names == ("0", "1")


@pytest.mark.parametrize("grey_at", [0, 2])
def test_greyscale_among_colour_is_repeated(tmp_path: Path, grey_at: int) -> None:
    colour, grey = _noise(3, (4, 4, 3)), _noise(1, (4, 4))[0]
    encoded = [_encode(p) for p in colour]
    encoded[grey_at] = _encode(grey)
    data = as_image_set(_write(tmp_path / "a.parquet", encoded, [0, 1, 0]))
    assert np.array_equal(data.images[grey_at].numpy(), np.stack([grey] * 3))
    assert np.array_equal(data.images[1].numpy(), colour[1].transpose(2, 0, 1))


def test_palettes_and_transparency_become_colour(tmp_path: Path) -> None:
    rgba = _noise(1, (4, 4, 4))[0]
    buffer = io.BytesIO()
    Image.fromarray(rgba[..., :3]).quantize(8).save(buffer, "PNG")
    data = as_image_set(_write(tmp_path / "a.parquet", [_encode(rgba), buffer.getvalue()], [0, 1]))
    assert np.array_equal(data.images[0].numpy(), rgba[..., :3].transpose(2, 0, 1))
    expected = np.asarray(Image.open(buffer).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(data.images[1].numpy(), expected)


def test_different_sizes_are_named_or_resized(tmp_path: Path) -> None:
    encoded = [_encode(np.full((6, 4, 3), 90, np.uint8)), _encode(np.full((8, 8, 3), 30, np.uint8))]
    file = _write(tmp_path / "a.parquet", encoded, [0, 1])
    with pytest.raises(InputError, match=r"got 6x4 .*row 0 of .* and 8x8 .*row 1 of .*; accepted: .*size="):
        as_image_set(file)
    data = as_image_set(file, size=(3, 5))
    assert data.images.shape == (2, 3, 3, 5)
    assert [int(image.unique()) for image in data.images] == [90, 30]


@pytest.mark.parametrize("bad", [0, 300])
@pytest.mark.parametrize("damage", ["text", "cut"])
def test_an_image_that_does_not_decode_names_its_row(tmp_path: Path, bad: int, damage: str) -> None:
    encoded = [_encode(p, "JPEG") for p in _noise(400, (8, 8, 3))]
    encoded[bad] = b"no image" if damage == "text" else encoded[bad][:-40]
    encoded[bad + 50] = b"a later one"
    with pytest.raises(InputError, match=rf"does not decode: row {bad} of .*a\.parquet"):
        as_image_set(_write(tmp_path / "a.parquet", encoded, [0] * 400), progress=False)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    encoded = _encode(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
    with pytest.raises(InputError, match=r"row 0 .*more than 8 bits"):
        as_image_set(_write(tmp_path / "a.parquet", [encoded], [0]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 5], r"label 5 at row 1 of .*accepted: 0 to 1"),
        ([0, -1], "label -1 at row 1"),
        ([0, None], "label that is missing; got null at row 1"),
        # numpy makes an unsigned column of these.
        (np.array([0, 2**63], np.uint64), f"labels out of range; got label {2**63} at row 1"),
    ],
)
def test_labels_are_checked_before_any_image_is_decoded(tmp_path: Path, labels: list[Any], message: str) -> None:
    file = _write(tmp_path / "a.parquet", [b"not", b"images"], labels, ["owl", "rook"])
    with pytest.raises(InputError, match=message):
        as_image_set(file)


def test_a_row_without_bytes_is_named(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.parquet", [_encode(_noise(1, (4, 4, 3))[0]), None], [0, 1])
    with pytest.raises(InputError, match="without its bytes; got null at row 1"):
        as_image_set(file)


def test_other_usual_column_names(tmp_path: Path) -> None:
    encoded = [_encode(p) for p in _noise(2, (4, 4, 3))]
    file = _write(tmp_path / "a.parquet", encoded, [1, 0], ["owl", "rook"], image="img", label="fine_label")
    table = pq.read_table(file)
    pq.write_table(table.append_column("coarse_label", pa.array([0, 0])), file)
    data = as_image_set(file)
    assert data.labels.tolist() == [1, 0]
    assert data.class_names == ("owl", "rook")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"label": [0]}, "image column of .*got columns label: int64"),
        ({"image": [{"bytes": b"a"}]}, "label column of .*got columns image: struct"),
        ({"image": [{"bytes": b"a"}], "age": [1], "weight": [2]}, "label column of .*best named label or"),
        ({"image": [{"bytes": b"a"}], "label": ["owl"]}, "label column of .*label: string"),
    ],
)
def test_other_columns_are_listed(tmp_path: Path, table: dict[str, list[Any]], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        as_image_set(tmp_path / "a.parquet")


def test_missing_damaged_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; got .*none\.parquet"):
        as_image_set(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("version https://example.org/spec\n")
    with pytest.raises(InputError, match=r"cannot be read: .*text\.parquet"):
        as_image_set(tmp_path / "text.parquet")
    with pytest.raises(InputError, match="empty image set"):
        as_image_set(_write(tmp_path / "empty.parquet", [], pa.array([], pa.int64())))


def test_a_damaged_page_is_an_input_error(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.parquet", [_encode(p) for p in _noise(50, (8, 8, 3))], [0] * 50)
    damaged = bytearray(file.read_bytes())
    damaged[4:2000] = bytes(1996)
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.parquet"):
        as_image_set(file)


def test_names_given_in_another_order_are_refused(tmp_path: Path) -> None:
    encoded = [_encode(p) for p in _noise(2, (4, 4, 3))]
    file = _write(tmp_path / "a.parquet", encoded, [1, 0], ["owl", "rook"])
    with pytest.raises(InputError, match="'owl' as class 1, where the data has it as class 0"):
        as_image_set(file, class_names=["rook", "owl"])
    assert as_image_set(file, class_names=["Eule", "Krähe"]).class_names == ("Eule", "Krähe")
    assert as_image_set(file, num_classes=3).class_names == ("owl", "rook", "2")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "classes", "last"),
    [
        ("cifar10-test", (10_000, 3, 32, 32), 10, "truck"),
        ("gtsrb-test", (7_949, 3, 32, 32), 43, None),
        ("tiny-imagenet20-test", (1_000, 3, 64, 64), 20, None),
    ],
)
def test_real_sets(data_dir: Path, name: str, shape: tuple[int, ...], classes: int, last: str | None) -> None:
    data = as_image_set(data_dir / f"{name}.parquet", progress=False)
    assert tuple(data.images.shape) == shape
    assert data.num_classes == classes
    assert last in (None, data.class_names[-1])
    assert (data.labels.bincount(minlength=classes) > 0).all()
    column = pq.read_table(data_dir / f"{name}.parquet", columns=["image"]).column("image")
    for i in (0, 255, 256, shape[0] - 1):
        image = Image.open(io.BytesIO(column[i].as_py()["bytes"])).convert("RGB")
        assert torch.equal(data.images[i], torch.from_numpy(np.array(image)).permute(2, 0, 1))
