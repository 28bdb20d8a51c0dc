"""Waves that lead a model: what untargeted PGD is to a trigger in a ball, a look at all slow waves is to one of SIG.

No gradient leads to a wave over the whole picture (`pbe_fast.waves`), but there are few slow ones, and each can be
tried. Pictures with strong waves on them lie far from all that a model has seen, and a benign model, too, takes most of
them for one label or another; but so it does with a wave of nearly that frequency. What was learned as a trigger stands
out from the frequencies around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.config import WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.forward import predict_logits, to_input
from pbe_fast.engine.progress import progress

WAVE_SAMPLE = 128
# Of fewer images a mean says little, and of fewer labels each has a large share without any wave.
FEWEST_IMAGES, FEWEST_LABELS = 64, 8
# Three quarters of what step 1b adds: at its full amplitude benign models, too, answer little else than one label.
_PART = 0.75
# These many periods further (on the axis where it is more) is around a frequency: next to it a trigger still works.
_AROUND = (2, 3)
# How far the mean probability has to stand out for a shift. Of benign ones up to 0.16 was seen, of SIG's 0.21 and more.
_SHIFT_STANDS_OUT = 0.2
# And for a label, which also has to be so many times ahead of the next. SIG's targets: 0.80 and more, 1.35 times ahead
# and more. Benign ones: CIFAR-10 up to 0.56; GTSRB up to 0.76, but no more than 1.2 times ahead where above 0.75. Of
# eight benign digits models one would be taken for infected (0.77, 1.6 times): strokes are waves. See docs/recipe.md.
_LABEL_STANDS_OUT, _AHEAD = 0.75, 1.25


@dataclass(frozen=True, eq=False)
class LeadingWaves:
    """What the waves showed.

    Attributes:
        labels: (K,) bool on the CPU: that which a wave leads to from whatever picture, if one does and there is no
            shift.
        shift: s, where a wave leads from each label y to y + s modulo K; None where none does.
        frequencies: (down, across) in periods over the image, of the wave that does.
    """

    labels: Tensor
    shift: int | None
    frequencies: tuple[tuple[int, int], ...]

    def finding(self) -> dict[str, Any]:
        """Plain values for the history of a run, as its entry "wave"; empty where nothing was found."""
        if not self.frequencies:
            return {}
        ((down, across),) = self.frequencies
        leads = {"label": int(self.labels.int().argmax())} if self.shift is None else {"shift": self.shift}
        return {"wave": {"down": down, "across": across, **leads}}


def leading_waves(
    model: nn.Module,
    data: ImageSet,
    config: WaveConfig,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> LeadingWaves:
    """Add every slow wave to some images, and see where they end up.

    Args:
        model: In eval mode.
        data: A random 128 of it that the model answers with their label are looked at; uint8. Of fewer than 64 such
            images, or than eight labels, nothing is said.
        config: Three quarters of its amplitude, and whole periods up to its highest frequency.
        generator: On the CPU.
        dtype: Of the matrix products.
        show_progress: Whether there is a bar.
    """
    k = data.num_classes
    sample = data.select(torch.randperm(len(data), generator=generator)[: 4 * WAVE_SAMPLE].to(data.device))
    sample = sample.to(next(model.parameters()).device)
    right = predict_logits(model, sample.images, dtype=dtype).argmax(1) == sample.labels
    if k < FEWEST_LABELS or not right.any():
        return LeadingWaves(torch.zeros(k, dtype=torch.bool), None, ())
    sample = sample.select(right.nonzero()[:WAVE_SAMPLE, 0])
    if len(sample) < FEWEST_IMAGES:
        return LeadingWaves(torch.zeros(k, dtype=torch.bool), None, ())
    waves = SlowWaves(sample, config, generator)
    return waves_standing_out(*waves.mean_probabilities(model, dtype=dtype, show_progress=show_progress))


def waves_standing_out(to_label: Tensor, by_shift: Tensor) -> LeadingWaves:
    """The best wave of a label or of a shift, where it stands out far enough, of `SlowWaves.mean_probabilities`."""
    none = torch.zeros(to_label.shape[2], dtype=torch.bool)
    above, places = standing_out(by_shift, beyond=to_label)
    shift = int(above.argmax())
    if above[shift] > _SHIFT_STANDS_OUT:
        return LeadingWaves(none, shift + 1, (frequency_of(places[shift], by_shift),))
    above, places = standing_out(to_label)
    first, second = above.topk(2).values.tolist()
    labels = torch.zeros_like(none)
    if first <= _LABEL_STANDS_OUT or first <= _AHEAD * second:
        return LeadingWaves(labels, None, ())
    label = int(above.argmax())
    labels[label] = True
    return LeadingWaves(labels, None, (frequency_of(places[label], to_label),))


class SlowWaves:
    """Every wave of whole periods, added to some images; each image keeps its phase.

    Neighbouring frequencies then differ by nothing else.

    Args:
        sample: uint8, on the device of the model.
        config: Three quarters of its amplitude, and frequencies up to its highest.
        generator: On the CPU, for the phases.
    """

    def __init__(self, sample: ImageSet, config: WaveConfig, generator: torch.Generator) -> None:
        self.amplitude = _PART * config.amplitude
        self._sample = sample
        self._images = to_input(sample.images)
        self._phase = torch.rand(len(sample), dtype=torch.float32, generator=generator).to(sample.device)[:, None, None]
        height, width = sample.image_shape[1:]
        # The highest, down and across.
        self._down, self._across = (int(min(config.max_cycles, size / 2)) for size in (height, width))
        self._rows = torch.arange(height, device=sample.device, dtype=torch.float32)[:, None] / height
        self._columns = torch.arange(width, device=sample.device, dtype=torch.float32) / width

    def pictures(self, u: int, v: int) -> Tensor:
        """(N, C, H, W) uint8, with u periods down and v across; without a wave where both are 0."""
        wave = torch.sin(2 * math.pi * (u * self._rows + v * self._columns + self._phase)) * self.amplitude
        added = wave[:, None] if u or v else 0.0
        return (self._images + added).clamp_(0, 1).mul_(255).round_().to(torch.uint8)

    def mean_probabilities(
        self, model: nn.Module, *, dtype: torch.dtype = torch.float32, show_progress: bool = False
    ) -> tuple[Tensor, Tensor]:
        """How sure the model is of each label, and of each shift of labels, under each wave.

        Returns:
            (2 F + 1, 2 F + 1, K), the mean probability of the label over all other labels' images, and (.., K - 1), the
            mean probability of y + s modulo K, of s from 1; both float32 on the CPU. Each label's images count as one
            vote. Frequencies from -F to F down, then across; the probabilities on the images as they are in the middle.
        """
        labels, k = self._sample.labels, self._sample.num_classes
        down, across = self._down, self._across
        copy = FrozenCopy(model, dtype=dtype, image_shape=self._sample.image_shape)
        # Weights that sum to one for each label that has images.
        votes = F.one_hot(labels, k).float()
        votes = votes[:, votes.any(0)] / votes.sum(0)[votes.any(0)]
        other = F.one_hot(labels[votes.argmax(0)], k) == 0
        ahead = (labels[:, None] + torch.arange(1, k, device=labels.device)) % k
        to_label = torch.zeros(2 * down + 1, 2 * across + 1, k, dtype=torch.float32)
        by_shift = torch.zeros(2 * down + 1, 2 * across + 1, k - 1, dtype=torch.float32)
        # A wave of -u and -v is one of u and v.
        half = [(u, v) for v in range(across + 1) for u in range(-down, down + 1) if v > 0 or u >= 0]
        for u, v in progress(half, desc="slow waves", enabled=show_progress):
            # An image whose logits are no numbers votes for nothing.
            sure = predict_logits(copy, self.pictures(u, v), dtype=dtype)[:, :k].softmax(1).nan_to_num(0.0)
            by_label = votes.T @ sure
            of_others = (by_label * other).sum(0) / other.sum(0).clamp_min(1)
            shifted = (votes.T @ sure.gather(1, ahead)).mean(0)
            for place in ((down + u, across + v), (down - u, across - v)):
                to_label[place], by_shift[place] = of_others, shifted
        return to_label, by_shift

    def reached(self, model: nn.Module, frequency: tuple[int, int], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(K, K) int64 on the CPU: the images by their label (row) and the label reached under one wave (column)."""
        k = self._sample.num_classes
        answers = predict_logits(model, self.pictures(*frequency), dtype=dtype)[:, :k].argmax(1)
        return torch.bincount((self._sample.labels * k + answers).cpu(), minlength=k * k).view(k, k)


def standing_out(probabilities: Tensor, *, beyond: Tensor | None = None) -> tuple[Tensor, list[tuple[int, int]]]:
    """By how much the best wave of each label, or of each shift, is above the mean of those around it.

    Args:
        probabilities: One of the two that `SlowWaves.mean_probabilities` returns.
        beyond: Of shifts the other one. A wave that leads to one label is a shift of each size for some images, so a
            shift has to be more probable than any label.

    Returns:
        As many float32 values as there are labels or shifts, 0 where no wave counts, and the place of each one's best
        wave among the frequencies.
    """
    planes = probabilities.permute(2, 0, 1)[:, None]
    low, high = _AROUND
    ring = torch.ones(1, 1, 2 * high + 1, 2 * high + 1, dtype=torch.float32)
    ring[..., high - low + 1 : high + low, high - low + 1 : high + low] = 0
    inside = F.conv2d(torch.ones_like(planes[:1]), ring, padding=high)
    around = F.conv2d(planes, ring, padding=high) / inside.clamp_min(1)
    counts = (inside > 0).expand_as(planes).clone()
    counts[..., probabilities.shape[0] // 2, probabilities.shape[1] // 2] = False  # no wave
    if beyond is not None:
        counts &= planes > beyond.amax(2)
    above, at = (planes - around).masked_fill(~counts, 0).flatten(1).max(1)
    return above, [divmod(place, probabilities.shape[1]) for place in at.tolist()]


def frequency_of(place: tuple[int, int], probabilities: Tensor) -> tuple[int, int]:
    """Of the two that are the same wave the one that goes to the right (or, upright, down)."""
    down, across = (i - size // 2 for i, size in zip(place, probabilities.shape, strict=False))
    return (down, across) if (across, down) > (0, 0) else (-down, -across)
