"""A small CNN for greyscale digits of 8 to 32 pixels: trains in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.errors import InputError


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch normalisation, one 2x2 max-pooling, average pooling, one linear layer.

    Args:
        num_classes: Number of logits K.
        in_channels: Channels C of the images.
        width: Channels of the first convolution; the other two have twice as many.

    Raises:
        InputError: A number below 1.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise InputError(f"{name} of SmallCNN", got=value, accepted="1 or more")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), H and W of at least 2."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
