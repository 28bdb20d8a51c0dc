from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pbe_fast.data import ImageSet, as_image_set, memory_map, save_npz


@pytest.fixture
def data() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 5, 4), dtype=torch.uint8, generator=generator)
    mask = torch.arange(30) % 3 == 0
    return ImageSet(images, torch.arange(30) % 4, tuple("abcd"), poison_mask=mask, name="some")


def _mapped(images: torch.Tensor, path: Path) -> bool:
    """Whether a change of the file is seen in the tensor."""
    content = bytearray(path.read_bytes())
    place = content.find(images.numpy().tobytes())
    assert place > 0
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([content[place] ^ 255]))
    seen = int(images.flatten()[0]) == content[place] ^ 255
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([content[place]]))
    return seen


def test_a_large_npz_keeps_its_images_in_the_file(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.npz"
    save_npz(data, path)
    for limit, mapped in ((1 << 30, False), (1, True)):
        monkeypatch.setattr(memory_map, "MAP_FROM_BYTES", limit)
        read = as_image_set(path, progress=False)
        assert read.sha256() == data.sha256()
        assert read.poison_mask is not None and data.poison_mask is not None
        assert torch.equal(read.poison_mask, data.poison_mask)
        assert read.class_names == data.class_names
        assert _mapped(read.images, path) == mapped


def test_writing_to_a_mapped_image_leaves_the_file_alone(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.npz"
    save_npz(data, path)
    before = path.read_bytes()
    monkeypatch.setattr(memory_map, "MAP_FROM_BYTES", 1)
    as_image_set(path, progress=False).images.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["compressed", "columns first"])
def test_what_cannot_be_mapped_is_read(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, images = tmp_path / "set.npz", data.images.numpy()
    save = np.savez_compressed if kind == "compressed" else np.savez
    save(path, images=images if kind == "compressed" else np.asfortranarray(images), labels=data.labels.numpy())
    monkeypatch.setattr(memory_map, "MAP_FROM_BYTES", 1)
    assert memory_map.map_member(path, "images") is None
    assert torch.equal(as_image_set(path, progress=False).images, data.images)


def test_a_read_only_map_of_an_npy_file_is_not_copied(data: ImageSet, tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, data.images.numpy())
    before = path.read_bytes()
    mapped = np.load(path, mmap_mode="r")
    read = as_image_set((mapped, data.labels.numpy()), progress=False)
    assert torch.equal(read.images, data.images)
    assert _mapped(read.images, path)
    read.images.zero_()
    assert path.read_bytes() == before


def test_a_part_of_a_map_is_that_part(data: ImageSet, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", data.images.numpy())
    part = np.load(tmp_path / "images.npy", mmap_mode="r")[7:20]
    read = as_image_set((part, data.labels[7:20].numpy()), progress=False)
    assert torch.equal(read.images, data.images[7:20])
