"""What the attacker is tested on: a small network without kinks, and images of which some lie at the box's border."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPE = (3, 8, 6)


def smooth_network() -> nn.Module:
    """Without kinks, so that the rounding of two ways to the same gradient cannot end on two sides of one."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 12, 5)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
        net.get_buffer("1.running_mean").fill_(0.2)
        net.get_buffer("1.running_var").fill_(2.0)
    return net.eval()


def some_images() -> Tensor:
    """Nine; some pixels at 0 and at 1, where the box cuts the ball."""
    return (torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1)


def some_labels() -> Tensor:
    return torch.randint(0, 5, (9,), generator=torch.Generator().manual_seed(2))


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)  # type: ignore[no-any-return]
