from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pbe_fast.data import ImageSet
from pbe_fast.errors import InputError


def _images(n: int = 4, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, 5, 6), dtype=torch.uint8, generator=generator)


@pytest.fixture
def data() -> ImageSet:
    return ImageSet(
        _images(),
        torch.tensor([0, 1, 2, 0]),
        ("owl", "rook", "wren"),
        poison_mask=torch.tensor([True, False, False, True]),
        true_labels=torch.tensor([2, 1, 2, 1]),
        name="birds",
    )


def test_what_it_says_of_itself(data: ImageSet) -> None:
    assert len(data) == 4
    assert data.num_classes == 3
    assert data.image_shape == (3, 5, 6)
    assert data.device == torch.device("cpu")
    assert ImageSet(_images(), torch.tensor([0, 3, 1, 0])).class_names == ("0", "1", "2", "3")


def test_it_cannot_be_changed(data: ImageSet) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("where", [[3, 1], torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
def test_selecting_keeps_everything_together(data: ImageSet, where: Any) -> None:
    part = data.select(where, name="some")
    order = [1, 3] if isinstance(where, torch.Tensor) and where.dtype == torch.bool else [3, 1]
    assert torch.equal(part.images, data.images[order])
    assert part.labels.tolist() == data.labels[order].tolist()
    assert part.poison_mask is not None
    assert part.poison_mask.tolist() == [order[0] == 3, order[1] == 3]
    assert part.true_labels is not None
    assert part.true_labels.tolist() == [1, 1]
    assert (part.class_names, part.name) == (data.class_names, "some")


def test_selecting_nothing_is_an_empty_set(data: ImageSet) -> None:
    for nothing in ([], torch.zeros(4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(InputError, match="empty image set"):
            data.select(nothing)


def test_floats(data: ImageSet) -> None:
    assert torch.equal(data.floats(), data.images.to(torch.float32) / 255)
    assert torch.equal(data.floats(slice(1, 3)), data.floats()[1:3])
    assert torch.equal(data.floats(torch.tensor([2, 0])), data.floats()[[2, 0]])


def test_the_digest_sees_pixels_shape_and_labels(data: ImageSet) -> None:
    changed = data.images.clone()
    changed[0, 0, 0, 0] += 1
    digests = {
        data.sha256(),
        dataclasses.replace(data, images=changed).sha256(),
        dataclasses.replace(data, images=data.images.reshape(4, 3, 6, 5)).sha256(),
        dataclasses.replace(data, labels=torch.tensor([0, 1, 2, 1])).sha256(),
    }
    assert len(digests) == 4
    assert dataclasses.replace(data, name="other").sha256() in digests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(4, 3, 5, 6)}, "got torch.float32 .*as_image_set converts"),
        ({"images": _images(4, 2)}, r"shape \(4, 2, 5, 6\)"),
        ({"images": _images()[0]}, r"shape \(3, 5, 6\)"),
        ({"images": _images(0)}, "empty image set"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels of an ImageSet; got torch.int64 of shape \(3,\)"),
        ({"labels": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}, "labels of an ImageSet; got torch.int32"),
        ({"labels": torch.tensor([0, 1, 3, 0])}, r"labels out of range; got values from 0 to 3; accepted: 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "labels out of range; got values from -1"),
        ({"labels": torch.tensor([0, 1, 2**40, 0]), "class_names": ()}, "labels out of range"),
        ({"labels": torch.full((4,), -1), "class_names": ()}, r"labels out of range; got values from -1 to -1"),
        ({"poison_mask": torch.tensor([0, 1, 0, 0])}, "poison_mask of an ImageSet; got torch.int64"),
        ({"poison_mask": torch.tensor([True])}, "poison_mask of an ImageSet"),
        ({"true_labels": torch.tensor([0, 1, 2, 3])}, "true_labels out of range"),
    ],
)
def test_what_does_not_fit_is_refused(data: ImageSet, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(data, **changes)


def test_copying_keeps_the_memory_and_takes_the_values(data: ImageSet) -> None:
    own = data.select(range(len(data)))
    other = own.select(list(reversed(range(len(data)))))
    memory = {name: tensor.data_ptr() for name, tensor in own._tensors().items()}
    assert own.copy_(other) is own
    assert {name: tensor.data_ptr() for name, tensor in own._tensors().items()} == memory
    assert all(torch.equal(tensor, other._tensors()[name]) for name, tensor in own._tensors().items())
    assert not torch.equal(own.images, data.images)


def test_what_is_not_of_a_kind_is_not_copied(data: ImageSet) -> None:
    own = data.select(range(len(data)))
    fewer = data.select([0, 1])
    others = [fewer, dataclasses.replace(own, poison_mask=None), dataclasses.replace(own, class_names=(*"abcdefgh",))]
    for other in others:
        with pytest.raises(InputError, match="set to copy"):
            own.copy_(other)
    assert torch.equal(own.images, data.images)
