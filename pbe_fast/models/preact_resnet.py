"""PreActResNet-18 for small images, the network of the paper's tables.

He et al., Identity Mappings in Deep Residual Networks, arXiv:1603.05027, in the form that the backdoor literature
shares: 3x3 stem, no max-pooling, and no batch normalisation between the last block and the pooling.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.errors import InputError

# On some AVX-512 machines oneDNN crashes in the backward pass of a strided 1x1 convolution of a channels_last tensor
# with fewer channels than this (torch 2.13); taking every second pixel first gives the same numbers.
_SAFE_STRIDED_CHANNELS = 16


class _Every(nn.Module):
    """Every ``stride``-th pixel of each row and column."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


class PreActBlock(nn.Module):
    """BN, ReLU, convolution, twice; the shortcut's 1x1 convolution takes the *activated* input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.subsample: nn.Module = nn.Identity()
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_planes != planes:
            if in_planes < _SAFE_STRIDED_CHANNELS:
                self.subsample, stride = _Every(stride), 1
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, H, W) to (B, planes, H / stride, W / stride), rounded up."""
        activated = F.relu(self.bn1(x))
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        if self.shortcut is None:
            return residual + x
        skip: Tensor = self.shortcut(self.subsample(activated))
        return residual + skip


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 with a CIFAR-style stem, for images of any size.

    As WaNet's authors (and BackdoorBench after them) define it, the last block's output goes to the average pooling
    as it is, without the BN and ReLU that He et al. put there. Parameter names are theirs as well, so that their
    published weights load. Pooling is adaptive: at 32 px it is their 4x4 average.

    Args:
        num_classes: Number of logits K.
        in_channels: Channels C of the images.
        width: Channels of the first stage; the stages have 1, 2, 4 and 8 times as many. 64 is the paper's.

    Raises:
        InputError: A number below 1.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise InputError(f"{name} of PreActResNet18", got=value, accepted="1 or more")
        self.conv1 = _conv3x3(in_channels, width)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(in_planes, planes, stride), PreActBlock(planes, planes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits
