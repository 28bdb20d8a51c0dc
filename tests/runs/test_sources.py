"""Which images go where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbe_fast.data import ImageSet, save_npz
from pbe_fast.errors import InputError
from pbe_fast.result import sha256_of_file
from pbe_fast.runs import Source, purification_sets, require_same_kind, reserve


@pytest.fixture
def data() -> ImageSet:
    images = torch.arange(120, dtype=torch.uint8).view(120, 1, 1, 1).expand(120, 1, 4, 4).contiguous()
    return ImageSet(images, torch.arange(120) % 3)


def first_pixels(data: ImageSet) -> set[int]:
    return set(data.images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(
    ("limit", "clean_count", "sizes"),
    [(None, 0, (120, 0)), (90, 30, (90, 30)), (None, 12, (108, 12)), (60, 0, (60, 0)), (12, 60, (12, 60))],
)
def test_training_and_clean_images_are_kept_apart(
    data: ImageSet, limit: int | None, clean_count: int, sizes: tuple[int, int]
) -> None:
    train, clean = reserve(data, limit=limit, clean_count=clean_count, seed=5)
    kept = first_pixels(clean) if clean is not None else set()
    assert (len(train), len(kept)) == sizes
    assert not kept & first_pixels(train)
    assert train.labels.bincount().tolist() == [len(train) // 3] * 3
    again, _ = reserve(data, limit=limit, clean_count=clean_count, seed=5)
    assert torch.equal(again.images, train.images)


@pytest.mark.parametrize(("limit", "clean_count"), [(121, 0), (100, 21), (None, 120), (0, 5), (5, -1)])
def test_more_images_than_there_are(data: ImageSet, limit: int | None, clean_count: int) -> None:
    with pytest.raises(InputError, match=r"out of the 120 of images; got .* and .*; accepted: together at most 120"):
        reserve(data, limit=limit, clean_count=clean_count, seed=0)


def test_a_source_says_where_it_came_from(data: ImageSet, tmp_path: Path) -> None:
    save_npz(data, tmp_path / "set.npz")
    source = Source.read(tmp_path / "set.npz")
    path = str(tmp_path / "set.npz")
    assert source.describe() == {"source": path, "images": 120, "sha256": sha256_of_file(path)}
    assert Source(data, "digits:train").describe()["sha256"] == data.sha256()


def test_sets_beside_the_model_stand_in(data: ImageSet, tmp_path: Path) -> None:
    for name in ("train", "clean", "test"):
        save_npz(data, tmp_path / f"{name}.npz")
    none = {"train": None, "clean": None, "clean_count": None, "test": None, "triggered": None}
    found = purification_sets(tmp_path, **none)
    # clean.npz is not taken unasked: with a clean set the algorithm is another one.
    assert {name for name, source in found.items() if source is not None} == {"train", "test"}
    other = tmp_path / "other.npz"
    save_npz(data.select(range(50)), other)
    found = purification_sets(tmp_path, **{**none, "train": str(other), "clean": str(other), "clean_count": 9})
    assert found["train"] is not None and len(found["train"].data) == 50
    assert found["clean"] is not None and len(found["clean"].data) == 9
    with pytest.raises(InputError, match="got neither train nor clean"):
        purification_sets(tmp_path / "elsewhere", **none)
    save_npz(data, tmp_path / "triggered.npz")
    with pytest.raises(InputError, match=r"without true labels; got .*triggered\.npz"):
        purification_sets(tmp_path, **none)


@pytest.mark.parametrize("count", [0, 121])
def test_a_draw_of_more_than_there_are_names_the_flag(data: ImageSet, count: int, tmp_path: Path) -> None:
    save_npz(data, tmp_path / "clean.npz")
    with pytest.raises(InputError, match=rf"\(--clean-count\); got {count} of 120 images; accepted: 1 to 120"):
        purification_sets(
            tmp_path, train=None, clean=str(tmp_path / "clean.npz"), clean_count=count, test=None, triggered=None
        )


def test_two_sets_of_different_kinds(data: ImageSet) -> None:
    first = Source(data, "first")
    require_same_kind(first, None)
    require_same_kind(first, Source(data.select([0]), "second"))
    larger = ImageSet(torch.zeros(2, 1, 5, 5, dtype=torch.uint8), torch.tensor([0, 2]))
    with pytest.raises(
        InputError, match=r"image shape of second; got \(1, 5, 5\); accepted: \(1, 4, 4\), as first has"
    ):
        require_same_kind(first, Source(larger, "second"))
    fewer = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="num classes of second; got 2; accepted: 3"):
        require_same_kind(first, Source(fewer, "second"))
