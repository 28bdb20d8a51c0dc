from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pbe_fast.data import as_image_set, as_train_and_clean
from pbe_fast.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


class Items(Dataset[Any]):
    """A dataset that says what it is told to."""

    def __init__(self, items: list[Any], classes: list[str] | None = None) -> None:
        self.items = items
        self.threads: set[int] = set()
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        self.threads.add(threading.get_ident())
        return self.items[i]


def _chw(i: int) -> torch.Tensor:
    return torch.from_numpy(PIXELS[i]).permute(2, 0, 1)


FORMS = {
    "pil": lambda i: Image.fromarray(PIXELS[i]),
    "uint8": _chw,
    "float": lambda i: _chw(i).float() / 255,
    "numpy": lambda i: _chw(i).numpy(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_every_form_of_image_and_label(form: str, kind: Any) -> None:
    dataset = Items([(FORMS[form](i), kind(i % 3)) for i in range(6)], ["owl", "rook", "wren", "tit"])
    data = as_image_set(dataset)
    assert np.array_equal(data.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.class_names == ("owl", "rook", "wren", "tit")
    # Nobody knows whether a user's dataset may be read in several threads.
    assert dataset.threads == {threading.get_ident()}


def test_subsets_keep_the_names() -> None:
    whole = Items([(FORMS["pil"](i), i % 2) for i in range(6)], ["owl", "rook"])
    data = as_image_set(Subset(Subset(whole, [5, 4, 0]), [0, 2]))
    assert np.array_equal(data.images.numpy(), PIXELS[[5, 0]].transpose(0, 3, 1, 2))
    assert data.class_names == ("owl", "rook")


def test_parts_of_one_set_keep_the_names_and_must_agree_on_them() -> None:
    parts = {
        names: Items([(_chw(0), 0), (_chw(1), 1)], names.split()) for names in ("owl rook", "rook owl", "owl rook x")
    }
    whole = ConcatDataset([parts["owl rook"], Subset(parts["owl rook x"], [1])])
    data = as_image_set(Subset(whole, [2, 0]))
    assert (data.labels.tolist(), data.class_names) == ([1, 0], ("owl", "rook", "x"))
    unnamed = ConcatDataset([parts["owl rook"], Items([(_chw(0), 0)])])
    assert as_image_set(unnamed).class_names == ("0", "1")
    with pytest.raises(InputError, match="different classes; got owl, rook and rook, owl; accepted: the same classes"):
        as_image_set(ConcatDataset([parts["owl rook"], parts["rook owl"]]))


def test_tensor_datasets_and_plain_lists() -> None:
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(as_image_set(TensorDataset(images, torch.arange(6))).images, images)
    assert torch.equal(as_image_set([(image, 0) for image in images]).images, images)


@pytest.mark.parametrize("keys", [("image", "label"), ("img", "fine_label"), ("pixel_values", "labels")])
def test_items_that_are_dictionaries(keys: tuple[str, str]) -> None:
    items = [
        {"index": i, **dict(zip(keys, (FORMS["pil"](i), i % 3), strict=True)), "coarse_label": 9} for i in range(6)
    ]
    data = as_image_set(Items(items))
    assert np.array_equal(data.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_dataset_that_lacks_classes_is_numbered_by_their_names() -> None:
    whole = ["cat", "dog", "eel"]
    part = Items([(_chw(i), i % 2) for i in range(6)], ["dog", "eel"])
    data = as_image_set(part, class_names=whole)
    assert (data.labels.tolist(), list(data.class_names)) == ([1, 2] * 3, whole)
    train = Items([(_chw(i), i % 3) for i in range(6)], whole)
    _, clean = as_train_and_clean(train, part)
    assert clean is not None and clean.labels.tolist() == [1, 2] * 3 and list(clean.class_names) == whole
    with pytest.raises(InputError, match=r"in another order .*'eel' as class 2, where the data has it as class 0"):
        as_train_and_clean(train, Items([(_chw(i), i % 3) for i in range(6)], ["eel", "dog", "cat"]))


def test_a_loader_is_not_its_dataset() -> None:
    with pytest.raises(InputError, match=r"got a DataLoader; accepted: the dataset in it: loader\.dataset"):
        as_image_set(DataLoader(Items([(_chw(0), 0)])))


def test_sizes_differ() -> None:
    dataset = Items([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 6), 0)])
    message = r"4x4 .* at item 0 of Items and 4x6 .* at item 1 of Items; .* pbe_fast\.as_image_set\(data, size="
    with pytest.raises(InputError, match=message):
        as_image_set(dataset)
    assert as_image_set(dataset, size=8).image_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 5, 4), r"item 1 of the dataset; got Tensor; accepted: \(image, label\) pairs"),
        (
            {"picture": 0, "label": 1},
            "got dict with the keys picture, label; .*one of image, img, pixel_values and one of",
        ),
        ((torch.zeros(3, 5, 4), 0, 0), "got tuple of 3; .*a dataset around yours can give the first two"),
        ((torch.zeros(3, 5, 4), 0.5), r"label of item 1; got 0.5 \(float\)"),
        ((torch.zeros(3, 5, 4), "owl"), "label of item 1; got 'owl'"),
        ((torch.zeros(3, 5, 4), torch.zeros(10)), "label of item 1"),
        (("path.png", 0), "image of item 1; got str"),
        ((torch.zeros(5, 4, 3), 0), r"shape of image of item 1; got \(5, 4, 3\).*permute\(2, 0, 1\)"),
        ((torch.zeros(5, 4), 0), r"shape of image of item 1; got \(5, 4\).*images\[None\]"),
        ((torch.full((3, 5, 4), float("nan")), 0), "NaN in image of item 1"),
        ((torch.full((3, 5, 4), -1.5), 0), "range of image of item 1.*normalised"),
        ((torch.zeros(3, 5, 4), -1), "label -1 at item 1 of Items"),
    ],
)
def test_a_wrong_item_is_named(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_image_set(Items([(torch.zeros(3, 5, 4), 0), item]))


class Failing(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        if i == 1:
            raise FileNotFoundError("no 1.png")
        return torch.zeros(1, 4, 4), 2**70 if i == 2 else 0


def test_an_item_that_fails_is_no_image_that_does_not_decode() -> None:
    with pytest.raises(InputError, match=r"item 1 .* cannot be read: Failing; got FileNotFoundError: no 1\.png"):
        as_image_set(Failing())
    with pytest.raises(InputError, match=f"label of item 1; got {2**70}; accepted: int64"):
        as_image_set(Subset(Failing(), [0, 2]))


def test_an_item_that_raises_is_named() -> None:
    class Broken(Items):
        def __getitem__(self, i: int) -> Any:
            if i == 2:
                raise OSError("image file is truncated")
            return super().__getitem__(i)

    with pytest.raises(
        InputError, match="item 2 of the dataset cannot be read: Broken; got OSError: image file is truncated"
    ):
        as_image_set(Broken([(torch.zeros(3, 5, 4), 0)] * 4))


def test_datasets_without_items_or_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    with pytest.raises(InputError, match="iterable-style dataset; got Stream"):
        as_image_set(Stream())
    with pytest.raises(InputError, match="empty image set; got Items of length 0"):
        as_image_set(Items([]))
