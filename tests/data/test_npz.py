from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbe_fast.data import ImageSet, as_image_set, save_npz
from pbe_fast.errors import InputError, OutputError


@pytest.fixture
def poisoned() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        images=torch.randint(0, 256, (7, 3, 4, 5), dtype=torch.uint8, generator=generator),
        labels=torch.tensor([0, 1, 2, 0, 0, 0, 1]),
        class_names=("owl", "rook", "wren", "Krähe"),
        poison_mask=torch.tensor([False, False, False, True, True, False, False]),
        true_labels=torch.tensor([0, 1, 2, 1, 2, 0, 1]),
        name="birds, poisoned",
    )


def test_everything_comes_back(poisoned: ImageSet, tmp_path: Path) -> None:
    save_npz(poisoned, tmp_path / "set.npz")
    read = as_image_set(tmp_path / "set.npz")
    for field in ("images", "labels", "poison_mask", "true_labels"):
        assert torch.equal(getattr(read, field), getattr(poisoned, field)), field
    assert read.class_names == poisoned.class_names
    assert read.name == poisoned.name
    assert read.sha256() == poisoned.sha256()
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    save_npz(ImageSet(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0])), tmp_path / "set.npz")
    read = as_image_set(tmp_path / "set.npz", name="other")
    assert read.poison_mask is None
    assert read.true_labels is None
    assert read.name == "other"


def test_resizing_keeps_the_truth(poisoned: ImageSet, tmp_path: Path) -> None:
    save_npz(poisoned, tmp_path / "set.npz")
    read = as_image_set(tmp_path / "set.npz", size=8)
    assert read.image_shape == (3, 8, 8)
    assert read.poison_mask is not None
    assert torch.equal(read.poison_mask, torch.as_tensor(poisoned.poison_mask))


def test_written_by_hand(tmp_path: Path) -> None:
    levels = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
    np.savez_compressed(tmp_path / "hand.npz", images=levels / np.float32(255), labels=np.array([1, 0], np.uint8))
    data = as_image_set(tmp_path / "hand.npz")
    assert np.array_equal(data.images.numpy(), levels)
    assert data.labels.tolist() == [1, 0]
    assert data.name == "hand"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_inside_does_not_run(tmp_path: Path) -> None:
    images = np.empty(1, dtype=object)
    images[0] = Bomb(tmp_path / "ran")
    np.savez(tmp_path / "evil.npz", images=images, labels=np.array([0]))
    with pytest.raises(InputError, match=r"cannot be read: .*evil\.npz; got an array of Python objects"):
        as_image_set(tmp_path / "evil.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"x": np.zeros(2)}, "arrays missing: images, labels; got x"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "arrays missing: labels"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2, int)}, r"set\.npz: .*channels seem"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(3, int)}, r"set\.npz: labels; got"),
        (
            {"images": np.zeros((1, 3, 4, 4), np.uint8), "labels": np.array([4]), "class_names": np.array(["a", "b"])},
            "label 4 at index 0",
        ),
        (
            {"images": np.zeros((1, 3, 4, 4), np.uint8), "labels": np.array([0]), "poison_mask": np.array([1])},
            r"poison_mask; got int64 of shape \(1,\); accepted: bool",
        ),
        (
            {"images": np.zeros((1, 3, 4, 4), np.uint8), "labels": np.array([0]), "poison_mask": np.array(["yes"])},
            r"poison_mask; got <U3 of shape \(1,\); accepted: bool of shape \(1,\), one per image",
        ),
        (
            {"images": np.zeros((1, 3, 4, 4), np.uint8), "labels": np.array([0]), "class_names": np.array(3)},
            r"class_names; got an array of shape \(\); accepted: \(K,\)",
        ),
        (
            {"images": np.zeros((1, 3, 4, 4), np.uint8), "labels": np.array([0]), "true_labels": np.array([9])},
            "true_labels out of range",
        ),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, stored: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "set.npz", **stored)
    with pytest.raises(InputError, match=message):
        as_image_set(tmp_path / "set.npz")


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        as_image_set(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "cut.npz", images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(2, int))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    for name in ("text", "single", "cut"):
        with pytest.raises(InputError, match=f"cannot be read: .*{name}"):
            as_image_set(tmp_path / f"{name}.npz")


def test_a_text_file_gets_no_advice_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="got a file that is no zip archive") as caught:
        as_image_set(tmp_path / "text.npz")
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_of_any_kind_is_bad_input(compressed: bool, tmp_path: Path) -> None:
    # Wherever a byte is wrong: in a header, in compressed data, in the directory at the end.
    path, rng = tmp_path / "set.npz", np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 6, 6), np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, images=images, labels=np.arange(4))
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            as_image_set(path)
        except InputError:
            refused += 1
    assert refused > 100


def test_where_it_can_be_written(poisoned: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"accepted: a path that ends in \.npz"):
        save_npz(poisoned, tmp_path / "set.npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_npz(poisoned, tmp_path / "file" / "set.npz")


def test_a_full_disk_leaves_the_old_file(poisoned: ImageSet, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "set.npz"
    save_npz(poisoned.select([0]), path)
    before = path.read_bytes()
    big = ImageSet(torch.zeros(4, 3, 256, 256, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OutputError, match="cannot write"):
            save_npz(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]
