"""Training and inference as scripts have them: a DataLoader of PIL pictures with torchvision's transforms, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from pbe_fast.config import FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.torchvision_compat import import_torchvision

transforms = import_torchvision().transforms

WORKERS = 2


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as PIL pictures that go through a transform one by one."""

    def __init__(self, data: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        self._pixels = data.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = data.labels.tolist()
        self._transform = transform
        self._to_picture = transforms.ToPILImage()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._to_picture(self._pixels[index])), self._labels[index]


def training_transform(side: int, augment: str) -> Callable[[Any], Tensor]:
    """The augmentation of `pbe_fast.data.augment`, with torchvision's classes."""
    steps: list[Any] = []
    if augment != "none":
        steps.append(transforms.RandomCrop(side, padding=max(1, side // 16)))
    if augment == "crop+flip":
        steps.append(transforms.RandomHorizontalFlip())
    chain: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.ToTensor()])
    return chain


def training_loader(
    data: ImageSet, config: FineTuneConfig, *, chosen: Tensor | None = None, **options: Any
) -> DataLoader[Any]:
    """Shuffled, augmented batches of ``data``, or of its images that are ``chosen``."""
    pictures: Dataset[Any] = Pictures(data, training_transform(data.image_shape[1], config.augment))
    if chosen is not None:
        pictures = Subset(pictures, chosen.tolist())
    size = min(config.batch_size, len(pictures))  # type: ignore[arg-type]
    # A last batch of few images would upset batch normalisation.
    return DataLoader(pictures, batch_size=size, shuffle=True, drop_last=True, num_workers=WORKERS, **options)


def loader_of(data: ImageSet, batch_size: int) -> DataLoader[Any]:
    """Batches of the images as they are, in their order."""
    return DataLoader(Pictures(data, transforms.ToTensor()), batch_size=batch_size, num_workers=WORKERS)


def sgd(model: nn.Module, config: FineTuneConfig, **options: Any) -> torch.optim.SGD:
    """The optimizer of steps 1b and 2."""
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        **options,
    )


def train_epoch(
    model: nn.Module, loader: DataLoader[Any], optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """One epoch as training scripts have it; the mean loss."""
    model.train()
    total, seen = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
        seen += len(images)
    return total / seen


@torch.no_grad()
def logits_of(model: nn.Module, data: ImageSet, device: torch.device, *, batch_size: int = 256) -> Tensor:
    """(N, K) logits of the images as they are, on the CPU."""
    model.eval()
    return torch.cat([model(images.to(device)).cpu() for images, _ in loader_of(data, batch_size)])
