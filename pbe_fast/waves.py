"""Random plane waves over images: what a patch is in space, a wave is in frequency, and PGD finds neither.

A trigger that is one wave (SIG) is spread over all pixels, further from the image than a small eps ball reaches, and
no gradient leads there: of 500 images of an infected CIFAR-10 model, attacked at 12/255 or at 48/255, 4 of 100 and 2 of
100 end up at the target, below chance. There are few low frequencies, though, and random waves come near all of them.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pbe_fast.config import WaveConfig
from pbe_fast.kernels.philox import random_words

# Philox's stream, "WAVE": no other operation draws the same numbers.
_STREAM = 0x57415645


class Waves:
    """The waves as an object that stands where `pbe_fast.attacker.PGD` does in step 1b; it needs no model.

    Args:
        config: Amplitude and frequencies.
    """

    def __init__(self, config: WaveConfig) -> None:
        self.config = config

    def __call__(self, images: Tensor, labels: Tensor, image_ids: Tensor, *, seed: int = 0) -> Tensor:
        """As `add_waves`; the labels are not looked at."""
        return add_waves(images, image_ids, self.config, seed=seed)


def add_waves(images: Tensor, image_ids: Tensor, config: WaveConfig, *, seed: int) -> Tensor:
    """Each image plus a wave of its own: amplitude * sin(2 pi (u row + v column) + phase), the same in all channels.

    u and v are uniform up to ``max_cycles`` periods over the image, or to half a period per pixel, u of either sign;
    half of the waves are within one period of one of the frequencies that they are to be ``near``, if there are such.
    The phase is uniform as well. They depend on seed and image id, not on the batch or (up to the rounding of sines) on
    the device.

    Args:
        images: (B, C, H, W) float32 in [0, 1].
        image_ids: (B,) int64.
        config: Amplitude, highest frequency, frequencies to be near.
        seed: 64 bits.

    Returns:
        (B, C, H, W) float32 in [0, 1], in the memory layout of ``images``.
    """
    # Centres of 2^23 equal intervals of (0, 1): exact in float32.
    words = random_words(image_ids, seed, _STREAM, 4)
    uniform = ((words[:, :3] >> 9) * 2 + 1).float() * 2.0**-24
    down, across, phase = uniform.view(-1, 3, 1, 1, 1).unbind(1)
    height, width = images.shape[2:]
    u, v = (2 * down - 1) * min(config.max_cycles / height, 0.5), across * min(config.max_cycles / width, 0.5)
    if config.near:
        draw = (words[:, 3] % (2 * len(config.near))).view(-1, 1, 1, 1)
        near = _on_device(config.near, images.device)[draw % len(config.near)]
        anywhere = draw >= len(config.near)
        u = torch.where(anywhere, u, (near[..., 0] + 2 * down - 1) / height)
        v = torch.where(anywhere, v, (near[..., 1] + 2 * across - 1) / width)
    rows, columns = (torch.arange(size, device=images.device, dtype=torch.float32) for size in (height, width))
    turns = u * rows[:, None] + v * columns + phase
    return (images + config.amplitude * torch.sin(2 * math.pi * turns)).clamp_(0, 1)


@functools.lru_cache(maxsize=16)
def _on_device(frequencies: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Kept: a copy from the host in every update would make a GPU wait for it."""
    return torch.tensor(frequencies, dtype=torch.float32, device=device)
