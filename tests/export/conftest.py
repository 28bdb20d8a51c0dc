"""A small network that is not trivial to export, and its file: made once, since an export takes seconds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.data import ImageSet
from pbe_fast.export import export_onnx
from pbe_fast.models import Normalized

CLASSES = ("cat", "dog", "lämp", "owl", "rat")


class TinyNet(nn.Module):
    """Convolution, batch norm with statistics of its own, pooling, linear."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(8 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(images)))
        hidden = nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        logits: Tensor = self.linear(self.drop(hidden))
        return logits


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    net = TinyNet()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
        net.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        # Centred logits, far apart: predictions that differ between images, or comparing them would prove little.
        net.linear.weight.mul_(20)
        model = Normalized(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).eval()
        net.linear.bias.sub_(model(image_set(100, seed=0).floats()).mean(0))
    return model.train()


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    return export_onnx(tiny, path, image_shape=(3, 8, 8), metadata={"class_names": '["cat", "lämp"]'})


def image_set(count: int, seed: int, **changes) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return ImageSet(**{"images": images, "labels": labels, "class_names": CLASSES, **changes})


@pytest.fixture(scope="session")
def images() -> ImageSet:
    """30 images: with one alone first, a batch size of 8 leaves 5 for the last batch."""
    return image_set(30, seed=1)


@pytest.fixture(scope="session")
def triggered() -> ImageSet:
    """Target 2 for all; three images were of class 2 already."""
    true = torch.arange(15) % 5
    return image_set(15, seed=2, labels=torch.full((15,), 2), true_labels=true, poison_mask=torch.ones(15).bool())
