"""On small files in the layouts of MNIST and GTSRB, which torchvision reads without a checksum."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe_fast.data import as_image_set
from pbe_fast.errors import InputError


def _idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_mnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {"train": (7, "train"), "test": (3, "t10k")}
    pixels = {part: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, (n, _) in parts.items()}
    for part, (n, prefix) in parts.items():
        _idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", pixels[part])
        _idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
    for part, (n, _) in parts.items():
        data = as_image_set(f"mnist:{tmp_path}:{part}")
        assert np.array_equal(data.images.numpy(), pixels[part][:, None])
        assert data.labels.tolist() == list(range(n))
        assert data.num_classes == 10
        assert data.name == f"mnist-{part}"


def test_gtsrb_of_many_sizes_becomes_32(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    for k, size in ((0, 20), (14, 60)):
        folder = base / "GTSRB" / "Training" / f"{k:05d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (size, size + 3), (k, 100, 200)).save(folder / "00000_00000.ppm")
    images = base / "GTSRB" / "Final_Test" / "Images"
    images.mkdir(parents=True)
    Image.new("RGB", (40, 50), (1, 2, 3)).save(images / "00000.ppm")
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;40;42\n")
    train = as_image_set(f"GTSRB:{tmp_path}:train")
    assert train.images.shape == (2, 3, 32, 32)
    assert sorted(train.labels.tolist()) == train.labels.tolist()
    assert train.num_classes == 43
    assert train.images[:, 1:].flatten(2).float().mean(2).tolist() == [[100, 200], [100, 200]]
    test = as_image_set(f"gtsrb:{tmp_path}:test", size=(16, 8))
    assert test.images.shape == (1, 3, 16, 8)
    assert test.labels.tolist() == [42]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "gtsrb", "mnist", "fashion-mnist"])
def test_a_set_that_is_not_there_is_not_downloaded(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"torchvision's .*, test; got .*accepted: a root that holds it"):
        as_image_set(f"{name}:{tmp_path}:test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["cifar10:root", "cifar10:", "cifar10::train", "cifar10:root:val"])
def test_other_forms_are_refused(source: str) -> None:
    with pytest.raises(InputError, match="accepted: 'NAME:ROOT:train' or"):
        as_image_set(source)


def test_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; got .*none"):
        as_image_set(f"cifar10:{tmp_path / 'none'}:train")
