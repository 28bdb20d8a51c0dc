from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pbe_fast.engine.progress as engine_progress
from pbe_fast.data import ImageSet, as_image_set, save_npz
from pbe_fast.data.decode import CHUNK
from pbe_fast.data.sources import READERS
from pbe_fast.errors import InputError


@pytest.fixture
def data() -> ImageSet:
    return ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("owl", "rook"))


def test_an_empty_name_is_not_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data; got an empty name; accepted: 'digits:train' or "):
        as_image_set("")


def test_an_image_set_passes_through(data: ImageSet) -> None:
    same = as_image_set(data)
    assert same.images is data.images
    other = as_image_set(data, name="night", num_classes=3, size=6)
    assert (other.name, other.class_names, other.image_shape) == ("night", ("owl", "rook", "2"), (1, 6, 6))
    with pytest.raises(InputError, match="labels out of range"):
        as_image_set(data, num_classes=1)


def test_strings_and_paths_alike(data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_npz(data, tmp_path / "Birds.NPZ")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (tmp_path / "Birds.NPZ", str(tmp_path / "Birds.NPZ"), "~/Birds.NPZ"):
        assert as_image_set(source).sha256() == data.sha256()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "data that does not exist; got 'nowhere/at/all'"),
        ("cifar11:root:train", "data that does not exist"),
        (torch.zeros(2, 3, 4, 4), "data; got torch.Tensor"),
        (None, "data; got builtins.NoneType"),
        ({"images": 1}, "data; got builtins.dict"),
        (7, "data; got builtins.int"),
    ],
)
def test_what_is_no_data_gets_the_list_of_what_is(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        as_image_set(source)
    for reader in READERS:
        # Of a name, what no name can stand for is no way out.
        assert (reader.form in str(caught.value)) == (reader.named or not isinstance(source, str))


def test_an_image_set_that_lacks_classes_is_numbered_by_their_names(data: ImageSet) -> None:
    names = ("finch", "owl", "tit", "rook")
    full = as_image_set(dataclasses.replace(data, true_labels=data.labels.flip(0)), class_names=names)
    assert (full.labels.tolist(), full.class_names) == ([1, 3], names)
    assert full.true_labels is not None and full.true_labels.tolist() == [3, 1]
    # Where they are in their places, or mere numbers, nothing moves.
    assert as_image_set(data, class_names=("owl", "rook", "tit")).labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="class names in another order"):
        as_image_set(ImageSet(data.images, data.labels), class_names=("1", "0", "2"))


def test_an_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"file of an unknown kind; got .*set\.csv.*\.parquet file"):
        as_image_set(tmp_path / "set.csv")


class Slow(torch.utils.data.Dataset[Any]):
    """Takes 0.6 seconds to read, in three units of work."""

    def __len__(self) -> int:
        return 3 * CHUNK

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i % CHUNK == 0:
            time.sleep(0.2)
        return torch.zeros(1, 2, 2), 0


def test_the_bar_comes_only_for_slow_reading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_progress, "DELAY_S", 0.4)
    monkeypatch.setattr(engine_progress, "LOG_INTERVAL_S", 0.1)
    as_image_set(Slow())
    assert "reading images" in capsys.readouterr().err
    as_image_set(Slow(), progress=False)
    assert capsys.readouterr().err == ""
    # Far from what a busy machine takes for 600 images.
    monkeypatch.setattr(engine_progress, "DELAY_S", 60.0)
    as_image_set([(torch.zeros(1, 2, 2), 0)] * 600)
    assert capsys.readouterr().err == ""


def test_importing_the_readers_loads_no_reader_library() -> None:
    heavy = ["pyarrow", "sklearn", "torchvision", "PIL.Image"]
    code = f"import sys, pbe_fast.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
