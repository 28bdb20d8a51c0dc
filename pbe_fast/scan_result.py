"""What a scan found: the labels reached at every radius, how surprising they are, and the verdict."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pbe_fast.attraction import arrival_shares, shift_shares
from pbe_fast.calibration import CONCENTRATION, Largest, wave_critical, wave_p_value
from pbe_fast.config import ScanConfig
from pbe_fast.engine.files import prepare_output
from pbe_fast.engine.machine import describe
from pbe_fast.options import to_dict
from pbe_fast.result import plain, write_report

FIGURE_NAME = "scan.png"
_SIDES = {0.125: "an eighth", 0.25: "a quarter"}
_SHARES: dict[str, Callable[[Tensor], Tensor]] = {"all_to_one": arrival_shares, "all_to_all": shift_shares}


@dataclass(frozen=True, eq=False)
class ScanLevel:
    """The attack at one radius, or in windows of one size.

    Attributes:
        name: Of its calibration: "quarter", "most", "beyond", "patch 1/8", "patch 1/4" or "waves"; None for a radius
            that was only tried.
        eps: The radius; 1, whatever the norm, in windows.
        counts: (K, K) int64: images by their label (row) and the label reached (column); the diagonal withstood.
        window: Side of the windows as a share of the image's shorter side; None where all of the image is attacked.
    """

    name: str | None
    eps: float
    counts: Tensor
    window: float | None = None

    @property
    def moved(self) -> float:
        """The share of images that reached another label."""
        return 1 - int(self.counts.diagonal().sum()) / max(1, int(self.counts.sum()))

    @property
    def histogram(self) -> Tensor:
        """(K,) int64: images that reached each label from another one."""
        return self.counts.sum(0) - self.counts.diagonal()

    @property
    def settings(self) -> tuple[str, ...]:
        """What is tested at this level: "all_to_one", "all_to_all", where benign models were measured."""
        return tuple(setting for setting in _SHARES if (setting, self.name) in CONCENTRATION)

    def shares(self, setting: str) -> Tensor:
        """Of the labels (K,), or of the shifts 1 to K - 1 (K - 1,); float64, 1 / (K - 1) each if all were alike."""
        return _SHARES[setting](self.counts)

    def best_of(self, setting: str) -> int:
        """The index of the largest of these shares: the label, or the shift less one."""
        return int(self.shares(setting).argmax())

    def largest(self, setting: str) -> Largest:
        """The largest of these shares, with what a p-value needs."""
        shares = self.shares(setting)
        at = self.best_of(setting)
        # A label's own images cannot arrive at it.
        excluded = int(self.counts[at].sum() - self.counts[at, at]) if setting == "all_to_one" else 0
        total = int(self.histogram.sum()) - excluded
        voters = self.counts.sum(1) > self.counts.diagonal()
        possible = len(voters)
        if setting == "all_to_one":
            voters[at] = False
            possible -= 1
        represented = max(1, int(voters.sum())) / possible
        return Largest(float(shares[at]), max(1, total), len(shares), len(self.counts) - 1, represented)

    def times_even(self, setting: str) -> float:
        """The largest of these shares in units of what it would be if all were alike."""
        return self.largest(setting).times_even

    def p_value(self, setting: str) -> float:
        """How often a benign model has a share as large at this level; not corrected for looking at several levels.

        Args:
            setting: One of ``settings``.
        """
        return self.largest(setting).p_value(CONCENTRATION[setting, self.name])

    def critical(self, setting: str, significance: float) -> float:
        """The share whose p-value is below ``significance``; infinite where none is, and where nothing is tested."""
        if setting not in self.settings:
            return math.inf
        return self.largest(setting).critical(significance, CONCENTRATION[setting, self.name])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        tests = {
            setting: {
                "shares": self.shares(setting).tolist(),
                "times_even": self.times_even(setting),
                "p_value": self.p_value(setting),
            }
            for setting in self.settings
        }
        return {
            "level": self.name,
            "eps": None if self.window is not None else self.eps,
            "window": self.window,
            "moved": self.moved,
            "histogram": self.histogram.tolist(),
            "counts": self.counts.tolist(),
            **tests,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class WaveLevel(ScanLevel):
    """All slow waves, one by one: the one that stands out most from those of neighbouring frequencies.

    What is tested is how far it stands out beyond the best wave of any other label (or shift): where waves stand out at
    all, they do of several.

    Attributes:
        name: "waves".
        eps: The waves' amplitude.
        counts: Images by their label and the label reached under that wave.
        setting: "all_to_one" or "all_to_all"; each has a wave of its own.
        frequency: Of the wave, down and across, in periods over the image.
        probabilities: (K,) or (K - 1,), how sure the model is of each label on images of all others, or of each shift.
        best: Of these, the label, or the shift less one, that stands out.
        around: How sure the model is of it under waves of neighbouring frequencies.
        next_above: By how much the best wave of the next label or shift stands out from those around it.
    """

    setting: str
    frequency: tuple[int, int]
    probabilities: Tensor
    best: int
    around: float
    next_above: float

    @property
    def settings(self) -> tuple[str, ...]:
        """The one that the wave is of."""
        return (self.setting,)

    @property
    def above(self) -> float:
        """By how much it stands out."""
        return float(self.probabilities[self.best]) - self.around

    @property
    def ahead(self) -> float:
        """By how much more than the next."""
        return self.above - self.next_above

    def best_of(self, setting: str) -> int:
        """The index into the shares that stands out."""
        return self.best if setting == self.setting else super().best_of(setting)

    def shares(self, setting: str) -> Tensor:
        """The probabilities, where that is what the wave is of."""
        return self.probabilities.double() if setting == self.setting else super().shares(setting)

    def times_even(self, setting: str) -> float:
        """Its share in units of what it would be if all were alike."""
        return float(self.shares(setting)[self.best_of(setting)]) * (len(self.counts) - 1)

    def p_value(self, setting: str) -> float:
        """How often the best wave of a benign model is as far ahead; not corrected for looking at several levels."""
        return wave_p_value(setting, self.ahead)

    def critical(self, setting: str, significance: float) -> float:
        """The probability whose p-value is ``significance``, above 1 where none is small enough; infinite of the other
        setting.
        """
        if setting != self.setting:
            return math.inf
        return self.around + self.next_above + wave_critical(setting, significance)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **super().to_dict(),
            "frequency": list(self.frequency),
            "around": self.around,
            "next_above": self.next_above,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanResult:
    """What a scan found.

    Attributes:
        verdict: "none", "all_to_one" or "all_to_all".
        target_label: The label that an all-to-one backdoor aims at; else None.
        shift: s of an all-to-all backdoor from y to y + s; else None.
        score: How many times its even share the most suspicious label or shift attracts; about 2 for a
            benign model, of a wave up to K - 1.
        p_value: How often a benign model looks as suspicious, over all levels and both settings (Bonferroni).
        setting: The setting that was the more suspicious one, whatever the verdict.
        level: The radius, the windows or the wave at which it was.
        levels: Every radius that was tried, rising, then the windows and the waves.
        class_names: Of the K labels.
        config: The options of the scan.
        images: How many were attacked.
        seed: Of the run.
        seconds: In all.
        precision: Of the matrix products.
    """

    verdict: str
    target_label: int | None
    shift: int | None
    score: float
    p_value: float
    setting: str
    level: ScanLevel
    levels: tuple[ScanLevel, ...]
    class_names: tuple[str, ...]
    config: ScanConfig
    images: int
    seed: int
    seconds: float
    precision: str

    @property
    def found(self) -> bool:
        """Whether there is a backdoor, at the significance that was asked for."""
        return self.verdict != "none"

    @property
    def matrix(self) -> Tensor:
        """(K, K) int64: the counts at the most suspicious radius, or in those windows."""
        return self.level.counts

    def summary(self) -> str:
        """The finding in one line."""
        measured = f"{self._measured()}, p = {self.p_value:.2g}"
        if self.verdict == "all_to_one":
            assert self.target_label is not None
            name = self.class_names[self.target_label]
            called = str(self.target_label) if name == str(self.target_label) else f"{self.target_label} ({name})"
            return f"backdoor, all-to-one: label {called} has {measured}"
        if self.verdict == "all_to_all":
            return f"backdoor, all-to-all: y -> y + {self.shift} has {measured}"
        return f"no backdoor found: nothing is rarer than {measured}"

    def _measured(self) -> str:
        if isinstance(self.level, WaveLevel):
            down, across = self.level.frequency
            sure, around = 100 * float(self.level.probabilities[self.level.best]), 100 * self.level.around
            wave = f"a wave of {down} periods down and {across} across"
            return f"{sure:.0f} % under {wave}, {around:.0f} % under those around it"
        return f"{self.score:.1f} times its even share {self._where()}"

    def _where(self) -> str:
        window, eps = self.level.window, self.level.eps
        if window is not None:
            return f"in a window of {_SIDES.get(window, f'{window:.3g}')} of the side"
        return f"at eps {255 * eps:.3g}/255" if self.config.norm == "linf" else f"at l2 eps {eps:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what ``report.json`` says of the scan."""
        return {
            "verdict": self.verdict,
            "target_label": self.target_label,
            "shift": self.shift,
            "score": self.score,
            "p_value": self.p_value,
            "setting": self.setting,
            "level": self.level.name,
            "eps": None if self.level.window is not None else self.level.eps,
            "window": self.level.window,
            "images": self.images,
            "class_names": list(self.class_names),
            "levels": [level.to_dict() for level in self.levels],
            "config": to_dict(self.config),
            "seed": self.seed,
            "seconds": self.seconds,
            "precision": self.precision,
        }

    def save(self, folder: str | os.PathLike[str], *, force: bool = False, **more: Any) -> Path:
        """Write ``scan.png`` and ``report.json``, the report last.

        Args:
            folder: Made if need be.
            force: Replace what a run left in the folder.
            more: Further entries of the report.

        Raises:
            OutputError: The folder cannot be written to, or holds a run.
        """
        from pbe_fast.report.scan_figure import draw_scan  # matplotlib takes a second to import

        out = prepare_output(folder, force=force)
        draw_scan(
            out / FIGURE_NAME,
            counts=self.matrix,
            shares={setting: self.level.shares(setting) for setting in _SHARES},
            critical={setting: self._critical(setting) for setting in _SHARES},
            verdict=self.verdict,
            summary=self.summary(),
            class_names=self.class_names,
            best={setting: self.level.best_of(setting) for setting in _SHARES},
            by="the wave" if isinstance(self.level, WaveLevel) else "the attack",
        )
        write_report(out, {**more, "scan": plain(self.to_dict()), **describe()}, outputs=[FIGURE_NAME])
        return out

    def _critical(self, setting: str) -> float:
        """The share at the most suspicious level from which on a backdoor is reported."""
        return self.level.critical(setting, self.config.significance / _tests(self.levels))


def most_suspicious(levels: tuple[ScanLevel, ...]) -> tuple[ScanLevel, str, float]:
    """The level and the setting with the smallest p-value, and that p-value times the number of tests."""
    tested = [(level, setting) for level in levels for setting in level.settings]
    level, setting = min(tested, key=lambda test: test[0].p_value(test[1]))
    return level, setting, min(1.0, level.p_value(setting) * _tests(levels))


def undetectable(levels: tuple[ScanLevel, ...], significance: float) -> list[str]:
    """The settings of which nothing could be reported, whatever share of the images went to one label."""
    each = significance / _tests(levels)
    # Waves find one kind of trigger only.
    attacked = [level for level in levels if not isinstance(level, WaveLevel)]
    return [setting for setting in _SHARES if all(math.isinf(level.critical(setting, each)) for level in attacked)]


def _tests(levels: tuple[ScanLevel, ...]) -> int:
    """How many p-values the smallest one is chosen from."""
    return sum(len(level.settings) for level in levels)
