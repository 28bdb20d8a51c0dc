"""Is there a backdoor, and where does it lead? Untargeted adversarial images tell (Sec. 3.4.1, Fig. 1 and 4)."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.attraction import arrival_shares, reached_labels, shift_shares
from pbe_fast.calibration import LEAST_REPRESENTED, Largest
from pbe_fast.config import PGDConfig, ScanConfig, to_dict
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.files import prepare_output
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.machine import describe
from pbe_fast.engine.precision import resolve_device, resolve_precision
from pbe_fast.engine.seeding import seeded
from pbe_fast.errors import InputError
from pbe_fast.models import check_model
from pbe_fast.result import plain, write_report

FIGURE_NAME = "scan.png"

# Which radii are tested: the first that moves a quarter of the images (the way to a faint trigger is the shortest), the
# first that moves most of them, and the first of twice that size (a trigger that changes every pixel takes more).
LEVELS = ("quarter", "most", "beyond")
_QUARTER, _MOST, _BEYOND = 0.25, 0.75, 2.0

# Concentrations of benign models, by setting and level: `python bench/efficacy/scan_models.py fit`.
CONCENTRATION = {
    ("all_to_all", "beyond"): 9.42,
    ("all_to_all", "most"): 5.40,
    ("all_to_all", "quarter"): 4.40,
    ("all_to_one", "beyond"): 1.16,
    ("all_to_one", "most"): 2.65,
    ("all_to_one", "quarter"): 2.74,
}
_SHARES: dict[str, Callable[[Tensor], Tensor]] = {"all_to_one": arrival_shares, "all_to_all": shift_shares}


@dataclass(frozen=True, eq=False)
class ScanLevel:
    """The attack at one radius.

    Attributes:
        name: "quarter", "most" or "beyond"; None for a radius that was only tried.
        eps: The radius.
        counts: (K, K) int64: images by their label (row) and the label reached (column); the diagonal withstood.
    """

    name: str | None
    eps: float
    counts: Tensor

    @property
    def moved(self) -> float:
        """The share of images that reached another label."""
        return 1 - int(self.counts.diagonal().sum()) / max(1, int(self.counts.sum()))

    @property
    def histogram(self) -> Tensor:
        """(K,) int64: images that reached each label from another one."""
        return self.counts.sum(0) - self.counts.diagonal()

    def shares(self, setting: str) -> Tensor:
        """Of the labels (K,), or of the shifts 1 to K - 1 (K - 1,); float64, 1 / (K - 1) each if all were alike."""
        return _SHARES[setting](self.counts)

    def largest(self, setting: str) -> Largest:
        """The largest of these shares, with what a p-value needs."""
        shares = self.shares(setting)
        at = int(shares.argmax())
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

    def p_value(self, setting: str) -> float:
        """How often a benign model has a share as large at this level; not corrected for looking at several levels."""
        assert self.name is not None
        return self.largest(setting).p_value(CONCENTRATION[setting, self.name])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        tests = {
            setting: {
                "shares": self.shares(setting).tolist(),
                "times_even": self.largest(setting).times_even,
                "p_value": self.p_value(setting),
            }
            for setting in _SHARES
            if self.name is not None
        }
        return {
            "level": self.name,
            "eps": self.eps,
            "moved": self.moved,
            "histogram": self.histogram.tolist(),
            "counts": self.counts.tolist(),
            **tests,
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanResult:
    """What a scan found.

    Attributes:
        verdict: "none", "all_to_one" or "all_to_all".
        target_label: The label that an all-to-one backdoor aims at; else None.
        shift: s of an all-to-all backdoor from y to y + s; else None.
        score: How many times its even share the most suspicious label or shift attracts; about 2 for a benign model.
        p_value: How often a benign model looks as suspicious, over all levels and both settings (Bonferroni).
        setting: The setting that was the more suspicious one, whatever the verdict.
        level: The radius at which it was.
        levels: Every radius that was tried, rising.
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
        """(K, K) int64: the counts at the most suspicious radius."""
        return self.level.counts

    def summary(self) -> str:
        """The finding in one line."""
        where = f"eps {255 * self.level.eps:.3g}/255" if self.config.norm == "linf" else f"l2 eps {self.level.eps:.3g}"
        measured = f"{self.score:.1f} times its even share at {where}, p = {self.p_value:.2g}"
        if self.verdict == "all_to_one":
            assert self.target_label is not None
            name = self.class_names[self.target_label]
            called = str(self.target_label) if name == str(self.target_label) else f"{self.target_label} ({name})"
            return f"backdoor, all-to-one: label {called} has {measured}"
        if self.verdict == "all_to_all":
            return f"backdoor, all-to-all: y -> y + {self.shift} has {measured}"
        return f"no backdoor found: nothing has more than {measured}"

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
            "eps": self.level.eps,
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
        )
        write_report(out, {**more, "scan": plain(self.to_dict()), **describe()}, outputs=[FIGURE_NAME])
        return out

    def _critical(self, setting: str) -> float:
        """The share at the most suspicious radius from which on a backdoor is reported."""
        assert self.level.name is not None
        each = self.config.significance / _tests(self.levels)
        return self.level.largest(setting).critical(each, CONCENTRATION[setting, self.level.name])


def scan(
    model: nn.Module,
    images: Any,
    *,
    config: ScanConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> ScanResult:
    """Look for a backdoor: attack images at several radii, and see where they end up.

    A benign model's adversarial images spread over the labels, if unevenly; those of an infected one tend to the label
    that the trigger leads to (all-to-one), or each label's to the label s further on (all-to-all).

    Args:
        model: Any module that returns (B, K) logits for float images (B, C, H, W) in [0, 1]. It is not changed.
        images: Clean images or training images, with their labels, in any form that `as_image_set` takes. Those that
            the model answers with another label are left out; a few hundred are enough.
        config: The attack, the radii, the significance.
        seed: Of the draw of images.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32" or "bf16".
        progress: Whether steps longer than two seconds show a bar, on stderr.

    Raises:
        InputError: Fewer than three classes, a model that does not fit the images, images that it answers rightly of
            fewer than half of the classes, or radii too small to move a quarter of them.
    """
    config = config or ScanConfig()
    where = resolve_device(device)
    start = time.perf_counter()
    data = as_image_set(images, progress=progress)
    if data.num_classes < 3:
        # With two labels there is one way to go.
        raise InputError("classes of the images to scan with", got=data.num_classes, accepted="3 or more")
    check_model(model, data.image_shape, data.num_classes)
    dtype = resolve_precision(where, precision)
    scanned: nn.Module = copy.deepcopy(model).to(device=where, dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scanned.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, where):
        sample = _sample(scanned, data, config.images, generator, dtype).to(where)
        labels = len(sample.labels.unique())
        if labels < LEAST_REPRESENTED * data.num_classes:
            raise InputError(
                "images to scan with",
                got=f"some that the model answers rightly of {labels} of {data.num_classes} classes",
                accepted="of half of the classes at least",
            )
        levels = _attack(scanned, sample, config, generator=generator, dtype=dtype, progress=progress)
    level, setting, p_value = most_suspicious(levels)
    verdict = setting if p_value < config.significance else "none"
    at = int(level.shares(setting).argmax())
    return ScanResult(
        verdict=verdict,
        target_label=at if verdict == "all_to_one" else None,
        shift=at + 1 if verdict == "all_to_all" else None,
        score=level.largest(setting).times_even,
        p_value=p_value,
        setting=setting,
        level=level,
        levels=levels,
        class_names=data.class_names,
        config=config,
        images=len(sample),
        seed=seed,
        seconds=time.perf_counter() - start,
        precision=str(dtype).removeprefix("torch."),
    )


def most_suspicious(levels: tuple[ScanLevel, ...]) -> tuple[ScanLevel, str, float]:
    """The level and the setting with the smallest p-value, and that p-value times the number of tests."""
    tested = [(level, setting) for level in levels if level.name is not None for setting in _SHARES]
    level, setting = min(tested, key=lambda test: test[0].p_value(test[1]))
    return level, setting, min(1.0, level.p_value(setting) * _tests(levels))


def _tests(levels: tuple[ScanLevel, ...]) -> int:
    """How many p-values the smallest one is chosen from."""
    return len(_SHARES) * sum(level.name is not None for level in levels)


def _sample(model: nn.Module, data: ImageSet, count: int, generator: torch.Generator, dtype: torch.dtype) -> ImageSet:
    """Up to ``count`` images that the model answers rightly, as even by label as there are images."""
    order = torch.randperm(len(data), generator=generator)
    # Enough for a model that is right half of the time; the whole of a large set need not be predicted.
    drawn = data.select(_even(data.labels.cpu()[order], order, 2 * count)).to(next(model.parameters()).device)
    right = predict_logits(model, drawn.images, dtype=dtype).argmax(1) == drawn.labels
    if not right.any():
        raise InputError(
            "images to scan with", got="none that the model answers with its label", accepted="its own data"
        )
    kept = right.nonzero()[:, 0].cpu()
    return drawn.select(_even(drawn.labels.cpu()[kept], kept, count))


def _even(labels: Tensor, indices: Tensor, count: int) -> Tensor:
    """The first ``count`` of ``indices``, taken in turns from each of their labels."""
    turn = torch.zeros_like(labels)
    for k in labels.unique():
        mine = labels == k
        turn[mine] = torch.arange(int(mine.sum()))
    return indices[turn.argsort(stable=True)[:count]]


def _attack(
    model: nn.Module,
    sample: ImageSet,
    config: ScanConfig,
    *,
    generator: torch.Generator,
    dtype: torch.dtype,
    progress: bool,
) -> tuple[ScanLevel, ...]:
    """The radii up to the one beyond that which moves most images."""
    levels: list[ScanLevel] = []
    names, beyond = list(LEVELS), 0.0
    for eps in config.eps:
        if eps < beyond:
            continue
        counts = reached_labels(
            model,
            sample,
            PGDConfig(norm=config.norm, eps=eps, steps=config.steps),
            generator=generator,
            dtype=dtype,
            desc=f"attacking, eps {eps:.3g}",
            show_progress=progress,
        )
        moved = ScanLevel(None, eps, counts).moved
        if names[0] == "quarter" and moved >= _MOST:
            names.pop(0)  # one radius has one name, and one calibration
        enough = {"quarter": moved >= _QUARTER, "most": moved >= _MOST, "beyond": True}
        name = names.pop(0) if enough[names[0]] else None
        if name == "most":
            beyond = _BEYOND * eps
        levels.append(ScanLevel(name, eps, counts))
        if not names:
            break
    if names[:1] == ["quarter"]:
        raise InputError(
            "radii that move a quarter of the images to another label",
            got=f"{100 * levels[-1].moved:.0f} % moved at eps {config.eps[-1]:.3g}",
            accepted="larger eps",
        )
    return tuple(levels)
