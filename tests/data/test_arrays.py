from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.errors import InputError


def _uint8(n: int = 5, channels: int = 3, size: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grey_level_survives_the_way_through_floats(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_image_set((levels.to(dtype) / 255, torch.tensor([0]))).images, levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted_to_its_own_precision(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    read = as_image_set(((levels.float() / 255).to(dtype), torch.tensor([0]))).images
    tolerance = 255 * torch.finfo(dtype).eps + 0.5
    assert (read.float() - levels.float()).abs().max() <= tolerance


def test_more_images_than_a_chunk_keep_their_places() -> None:
    levels = torch.arange(5000).remainder(251).to(torch.uint8).reshape(-1, 1, 1, 1)
    labels = torch.arange(5000) % 10
    data = as_image_set((levels.float() / 255, labels))
    assert torch.equal(data.images, levels)
    assert torch.equal(data.labels, labels)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8])
def test_numpy_pairs_and_integer_labels(dtype: type[np.integer]) -> None:
    images = _uint8()
    labels = np.array([0, 1, 2, 1, 0], dtype=dtype)
    data = as_image_set((images.numpy(), labels), name="mine")
    assert torch.equal(data.images, images)
    assert data.labels.tolist() == [0, 1, 2, 1, 0]
    assert (data.labels.dtype, data.num_classes, data.name) == (torch.int64, 3, "mine")


def test_lists_of_labels_and_awkward_memory() -> None:
    images = _uint8().numpy()
    read_only = images.copy()
    read_only.flags.writeable = False
    reversed_rows = images[:, :, ::-1]
    transposed = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for array in (read_only, reversed_rows, transposed):
        data = as_image_set((array, [0, 0, 1, 1, 0]))
        assert data.images.is_contiguous()
        assert np.array_equal(data.images.numpy(), array)


def test_rounding_errors_at_the_ends_are_clamped() -> None:
    images = torch.tensor([-1e-7, 1 + 1e-7, 0.5, 1.0]).reshape(1, 1, 2, 2)
    assert as_image_set((images, [0])).images.flatten().tolist() == [0, 255, 128, 255]


def test_labels_may_show_fewer_classes_than_there_are() -> None:
    assert as_image_set((_uint8(2), [0, 1]), num_classes=10).class_names == tuple("0123456789")
    assert as_image_set((_uint8(2), [0, 1]), class_names=["cat", "dog", "owl"]).num_classes == 3


def test_resizing_keeps_flat_colour_and_means() -> None:
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert as_image_set((flat, [0, 1]), size=(16, 12)).images.unique().tolist() == [77]
    noise = _uint8(1, 1, 32)
    small = as_image_set((noise, [0]), size=4).images
    assert small.shape == (1, 1, 4, 4)
    # Antialiased shrinking averages: without it 4x4 of 1,024 samples would keep the full spread.
    assert small.float().std() < 0.5 * noise.float().std()
    assert abs(small.float().mean() - noise.float().mean()) < 6


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 4, 4, 3), r"channels seem to come last.*permute\(0, 3, 1, 2\)"),
        (torch.rand(2, 28, 28), r"a dimension is missing.*images\[:, None\]"),
        (torch.rand(2, 4, 8, 8), "alpha"),
        (torch.rand(2, 5, 8, 8), r"got \(2, 5, 8, 8\)"),
        (torch.rand(2, 3, 8, 8) * 255, "divide by 255"),
        (torch.randn(2, 3, 8, 8), "normalised.*Normalized"),
        (torch.rand(2, 3, 8, 8) * 1e4, "range of images; got values from"),
        (torch.full((2, 3, 8, 8), float("inf")), "range of images; got values from inf"),
        (torch.ones(2, 3, 8, 8, dtype=torch.int64), "dtype of images; got torch.int64; accepted: uint8, or float"),
        (np.full((2, 3, 4, 4), "a"), "dtype of images"),
        (np.zeros((2, 3, 4, 4), dtype=">f4"), "dtype of images; got >f4"),
        (torch.zeros(0, 3, 8, 8), r"empty images; got shape \(0, 3, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), "empty images"),
    ],
)
def test_wrong_images_are_named(images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_image_set((images, [0, 1]))


def test_nan_names_the_image() -> None:
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[4, 1, 2, 3] = float("nan")
    with pytest.raises(InputError, match="NaN in image 4"):
        as_image_set((images, torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 2], {}, r"shape \(3,\).*shape \(2,\), one per image"),
        (torch.tensor([0.0, 1.0]), {}, "labels; got torch.float32"),
        (torch.eye(2, dtype=torch.int64), {}, r"argmax\(1\)"),
        (torch.tensor([[0], [1]]), {}, r"labels\[:, 0\]"),
        (["cat", "dog"], {}, "labels; got list"),
        ([0, -1], {}, "labels out of range; got label -1 at index 1"),
        ([-1, -1], {}, "label -1 at index 0"),
        ([3, 12], {"num_classes": 10}, r"label 12 at index 1 \(1 such labels\); accepted: 0 to 9 \(10 classes\)"),
        ([0, 2], {"class_names": ["cat", "dog"]}, "accepted: 0 to 1"),
        ([0, 2**40], {}, f"label {2**40} at index 1"),
        ([0, 1], {"num_classes": 3, "class_names": ["cat", "dog"]}, "num_classes=3 and 2 names"),
        ([0, 1], {"num_classes": 0}, "num_classes; got 0"),
        ([0, 1], {"class_names": []}, "class_names; got no names"),
        ([0, 1], {"size": 0}, "size; got"),
    ],
)
def test_wrong_labels_and_options_are_named(labels: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_image_set((_uint8(2), labels), **options)  # type: ignore[arg-type]


def test_gradients_are_not_carried_along() -> None:
    images = torch.rand(2, 1, 4, 4, requires_grad=True)
    assert isinstance(as_image_set((images, [0, 1])), ImageSet)
