from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_fast.data import as_image_set
from pbe_fast.errors import InputError


def _save(path: Path, value: int, shape: tuple[int, ...] = (4, 4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    _save(root / "dog" / "b.png", 20)
    _save(root / "dog" / "a.PNG", 10)
    _save(root / "cat" / "x.bmp", 30)
    _save(root / "cat" / "images" / "deep.ppm", 40)
    _save(root / "cat" / ".hidden.png", 99)
    _save(root / ".cache" / "thumb.png", 99)
    (root / "cat" / "boxes.txt").write_text("0 0 4 4")
    return root


def test_classes_and_files_in_sorted_order(tree: Path) -> None:
    data = as_image_set(tree)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [30, 40, 10, 20]
    assert data.images.shape == (4, 3, 4, 4)
    assert data.name == "pets"


def test_numbers_follow_the_names_given(tree: Path) -> None:
    data = as_image_set(tree, class_names=["bird", "dog", "cat"])
    assert data.labels.tolist() == [2, 2, 1, 1]
    assert data.num_classes == 3
    with pytest.raises(InputError, match="not among the class names; got dog; accepted: cat, cow"):
        as_image_set(tree, class_names=["cat", "cow"])


def test_agrees_with_torchvisions_image_folder(tmp_path: Path) -> None:
    from pbe_fast.torchvision_compat import import_torchvision

    for k, name in enumerate(["0", "1", "2", "10", "Zebra", "ant"]):
        _save(tmp_path / name / "a.png", k)
    theirs = import_torchvision().datasets.ImageFolder(str(tmp_path))
    ours = as_image_set(tmp_path)
    assert list(ours.class_names) == theirs.classes
    assert ours.labels.tolist() == theirs.targets
    assert ours.images[:, 0, 0, 0].tolist() == [np.asarray(image)[0, 0, 0] for image, _ in theirs]


def test_different_sizes_name_both_files(tree: Path) -> None:
    _save(tree / "dog" / "c.png", 50, (6, 8, 3))
    with pytest.raises(InputError, match=r"4x4 .*x\.bmp and 6x8 .*c\.png"):
        as_image_set(tree)
    assert as_image_set(tree, size=5).images.shape == (5, 3, 5, 5)


def test_a_file_that_does_not_decode_is_named(tree: Path) -> None:
    (tree / "dog" / "ab.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(InputError, match=r"does not decode: .*dog/ab\.png"):
        as_image_set(tree)


def test_other_layouts_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a class-per-folder tree; got .* with 0 files and no folders"):
        as_image_set(tmp_path)
    _save(tmp_path / "a.png", 1)
    with pytest.raises(InputError, match=r"1 files and no folders \(first file: a.png\)"):
        as_image_set(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="empty image set; got no image files"):
        as_image_set(tmp_path)


def test_a_folder_of_splits_is_not_taken_for_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        _save(tmp_path / part / "cat" / "a.png", 1)
    with pytest.raises(InputError, match="folder of splits"):
        as_image_set(tmp_path)
    assert as_image_set(tmp_path / "train").class_names == ("cat",)
