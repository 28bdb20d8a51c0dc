"""Input-aware dynamic attack (Nguyen and Tran, 2020): networks draw a pattern and a mask for each image of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.errors import InputError
from pbe_fast.triggers.base import ImageShape, Trigger

_STAGES = 3
_GROUPS = 4
_MAX_WIDTH = 1024
# Pixels that the networks see at a time when nothing is trained: 256 images of 32 x 32.
_CHUNK_PIXELS = 2**18


class InputAware(Trigger):
    """x (1 - m) + p m, where the pattern p and the mask m are drawn by networks that see x.

    Until it is trained (`pbe_fast.train_infected` does that, along with the classifier) it is a random function of the
    image. What it has learned is in ``weights``: ``spec`` alone gives the untrained networks.

    Cover images get the pattern and mask of another image (the paper's cross mode), so that a trigger works on its own
    image only.

    Args:
        image_shape: (C, H, W); any H and W.
        seed: Fixes the networks' first weights.
        width: Channels of their first stage, a multiple of 4; by default 32, and 16 for greyscale images.

    Raises:
        InputError: A width that is no positive multiple of 4.
    """

    name = "input_aware"
    cover_ratio = 1.0
    redraw_each_epoch = True

    def __init__(self, image_shape: ImageShape, *, seed: int = 0, width: int | None = None) -> None:
        super().__init__(image_shape, seed=seed)
        channels = self.image_shape[0]
        self.width = (32 if channels == 3 else 16) if width is None else width
        if not _GROUPS <= self.width <= _MAX_WIDTH or self.width % _GROUPS:
            accepted = f"a multiple of {_GROUPS} up to {_MAX_WIDTH}"
            raise InputError("width of the input_aware trigger", got=width, accepted=accepted)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.generator = EncoderDecoder(channels, channels, self.width).float()
            self.mask_network = EncoderDecoder(channels, 1, self.width).float()

    def masks(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) in [0, 1], of (B, C, H, W) in [0, 1]; with gradients for the mask network where they are on."""
        soft = self.mask_network(images)
        # Almost 0 or 1, and still with a slope to learn by.
        return torch.tanh(20 * soft - 10) / 2 + 0.5

    def wear(self, images: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
        """``images`` with the triggers of ``donors``, and the patterns; gradients go to the generator alone.

        Args:
            images: (B, C, H, W) float in [0, 1].
            donors: Likewise; ``images`` itself for the attack, other images for the cross mode.

        Returns:
            (B, C, H, W) each, in [0, 1].
        """
        with torch.no_grad():
            masks = self.masks(donors)
        patterns = self.generator(donors)
        return torch.lerp(images, patterns, masks), patterns

    def to(self, device: torch.device | str) -> InputAware:
        """Move the networks; returns the trigger itself."""
        self.generator.to(device)
        self.mask_network.to(device)
        return self

    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        return self._worn(images, images)

    def cover(self, images: Tensor, image_ids: Tensor, *, draw: int = 0, others: Tensor | None = None) -> Tensor:
        """``images`` with the triggers of ``others``.

        Raises:
            InputError: Without ``others``, or of another shape.
        """
        if others is None or others.shape != images.shape:
            got = "none" if others is None else f"shape {tuple(others.shape)}"
            raise InputError(
                f"others, whose triggers the cover images of the {self.name} trigger get",
                got=got,
                accepted=f"as many images as are covered: {tuple(images.shape)}",
            )
        return self._worn(images, others).clamp_(0, 1)

    @torch.no_grad()
    def _worn(self, images: Tensor, donors: Tensor) -> Tensor:
        self.to(images.device)
        size = max(1, _CHUNK_PIXELS // (self.image_shape[1] * self.image_shape[2]))
        pairs = zip(images.split(size), donors.split(size), strict=True)
        return torch.cat([self.wear(part, given)[0] for part, given in pairs])

    def hyperparameters(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {"width": self.width}

    def weights(self) -> dict[str, Tensor]:
        """Of both networks, by name, on the CPU."""
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self._networks().state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `weights` gave."""
        own = {name: tuple(value.shape) for name, value in self.weights().items()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        if wrong:
            first = wrong[0]
            raise InputError(
                f"weights of the {self.name} trigger for images {self.image_shape}, width {self.width}",
                got=f"{first}: {given.get(first, 'missing')}, and {len(wrong) - 1} more that differ",
                accepted=f"{first}: {own.get(first, 'no such weight')}",
            )
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise InputError(f"weights of the {self.name} trigger", got="NaN or infinite", accepted="finite values")
        self._networks().load_state_dict(dict(weights))

    def _networks(self) -> nn.ModuleDict:
        return nn.ModuleDict({"generator": self.generator, "mask": self.mask_network})


class EncoderDecoder(nn.Module):
    """Three stages down and three up, to a picture of the same height and width with values in [0, 1].

    Two departures from the authors' networks. Each stage up also sees what the stage down made at its size: a trigger
    learns to fit its own image in tens of epochs, not hundreds. And group normalisation in place of batch
    normalisation: the trigger of an image is the same in training, where a tenth of a batch is too few images for
    batch statistics, and afterwards.

    Args:
        in_channels: Of the images.
        out_channels: Of the picture.
        width: Channels of the first stage; doubled by each of the others.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        widths = [width << stage for stage in range(_STAGES)]
        self.down = nn.ModuleList(
            nn.Sequential(*_block(before, after), *_block(after, after))
            for before, after in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.middle = nn.Sequential(*_block(widths[-1], widths[-1]))
        self.up = nn.ModuleList(
            nn.Sequential(*_block(before, before), *_block(before, after))
            for before, after in zip(widths[::-1], [*widths[-2::-1], width], strict=True)
        )
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """(B, out_channels, H, W) in [0, 1] of images (B, C, H, W) in [0, 1]."""
        x, skips = (2 * images - 1).contiguous(memory_format=torch.channels_last), []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            # Rounded up, so that single pixels stay; on the way up each stage gets back the size that it had here.
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = stage(F.interpolate(x, size=skip.shape[2:], mode="nearest") + skip)
        return torch.tanh(self.last(x)) / 2 + 0.5


def _block(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.GroupNorm(_GROUPS, after), nn.ReLU()
