"""Options of Algorithm 1."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pbe_fast.config.steps import FineTuneConfig, PGDConfig, WaveConfig
from pbe_fast.options import check, check_types, option


@dataclass(frozen=True, kw_only=True)
class PurifyConfig:
    """Algorithm 1: its rounds, their fractions, and the fine-tuning in each.

    The defaults depart from the paper where that was measured to help (docs/recipe.md); `PurifyConfig.paper` is
    Algorithm 1 to the letter.
    """

    pgd: PGDConfig = option(PGDConfig(), "step 1a")
    finetune: FineTuneConfig = option(FineTuneConfig(augment="auto"), "steps 1b and 2")
    eps_factors: tuple[float, ...] = option(
        (1.0, 1 / 3, 1 / 8),
        "factors on eps that the updates of step 1b go through in turn: the way to a faint trigger is a short one",
    )
    patch_windows: tuple[float, ...] = option(
        (0.25, 0.125),
        "sides of further turns of step 1b, as shares of the image's: they change one random window of each image, and "
        "that at will, which is the way to a patch (none: no such turns)",
    )
    smooth_grids: tuple[int, ...] = option(
        (8, 4),
        "further turns of step 1b: PGD on grids of so many values along each axis, spread smoothly over the image, "
        "which is the way to a faint picture (none: no such turns)",
    )
    smooth_eps: float = option(0.12, "how far these may change a pixel, in pixel units of [0, 1]")
    wave_amplitudes: tuple[float, ...] = option(
        (0.2, 0.2),
        "further turns of step 1b: random plane waves of these amplitudes, in pixel units of [0, 1], the way to a "
        "trigger that is spread over all pixels; one that leads the infected model is looked for first (none: neither)",
    )
    adversarial_steps: int = option(
        180, "updates of step 1b in each round, which its turns share; fewer than there are turns leave some out"
    )
    clean_steps: int = option(150, "updates of step 2 in each round, at least")
    clean_epochs: int = option(4, "passes over the extra set in step 2 of each round, at least")
    fractions: tuple[float, ...] = option(
        (0.10, 0.30, 0.60, 0.70), "without a clean set: the extra set's share of the training set, by round"
    )
    refining_fractions: tuple[float, ...] = option(
        (0.70, 0.70),
        "with a clean set and the training set: further rounds on the training images that rank clean, and their share "
        "(none: the paper, which stops after the clean set)",
    )
    initial: str = option(
        "steady",
        "the first extra set without a clean set: random (the paper); hard images, none of labels that attract the "
        "attack; or steady: likewise, and where none is found, those whose label withstands small changes",
        ("steady", "hard", "random"),
    )
    steady_share: float = option(0.25, "how much of the images counts as steady enough for the first extra set")
    fragile_share: float = option(
        0.3,
        "where no label is found, with a clean set or without: the most fragile images, which come into later extra "
        "sets only where they rank as well as the others and the purified model agrees (0: none)",
    )
    hard_quantile: float = option(0.3, "how much of each label counts as hard")
    label_floor: float = option(
        0.5,
        "without a clean set, and among steady images: what every label gives to an extra set at least, as a share of "
        "what it gave if all gave alike (0: the paper)",
    )
    leave_out: bool = option(
        True,
        "with initial steady, where no label attracts: purify two or four times without images of half of the "
        "labels, to see of which label the model changes most, and leave that one out of the first extra set (of eight "
        "labels and more)",
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("adversarial_steps", "clean_steps", "clean_epochs"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        check(
            len(self.eps_factors) >= 1 and all(0 < f < math.inf for f in self.eps_factors),
            "eps_factors",
            self.eps_factors,
            "each above 0, at least one",
        )
        largest = max(self.eps_factors) * self.pgd.eps
        accepted = f"factors that leave eps, {self.pgd.eps:.3g}, at most 1: pixels are in [0, 1]"
        check(self.pgd.norm != "linf" or largest <= 1, "eps_factors", self.eps_factors, accepted)
        finite = all(0 < a < math.inf for a in self.wave_amplitudes)
        check(finite, "wave_amplitudes", self.wave_amplitudes, "each above 0")
        grids = all(grid >= 1 for grid in self.smooth_grids)
        check(grids, "smooth_grids", self.smooth_grids, "each 1 or more")
        check(0 < self.smooth_eps <= 1, "smooth_eps", self.smooth_eps, "above 0 and at most 1")
        sides = all(0 < w <= 1 for w in self.patch_windows)
        check(sides, "patch_windows", self.patch_windows, "each above 0 and at most 1")
        check(len(self.fractions) >= 1, "fractions", self.fractions, "one per round, at least one")
        for name in ("fractions", "refining_fractions"):
            fractions = getattr(self, name)
            check(all(0 < f <= 1 for f in fractions), name, fractions, "each above 0 and at most 1")
        check(self.initial in ("steady", "hard", "random"), "initial", self.initial, "steady, hard, random")
        check(0 < self.steady_share <= 1, "steady_share", self.steady_share, "above 0 and at most 1")
        check(0 <= self.fragile_share < 1, "fragile_share", self.fragile_share, "0 up to 1")
        check(0 <= self.label_floor <= 1, "label_floor", self.label_floor, "0 to 1")
        check(0 < self.hard_quantile <= 1, "hard_quantile", self.hard_quantile, "above 0 and at most 1")

    @classmethod
    def paper(cls) -> PurifyConfig:
        """Algorithm 1 to the letter: one eps and no other turns, no distillation or clean images in step 1b, a random
        first extra set, one round with a clean set.
        """
        plain = FineTuneConfig(mix_clean=False, distill_weight=0.0)
        # The updates of its one turn, as they were before there were others.
        no_turns: dict[str, Any] = {
            "patch_windows": (),
            "smooth_grids": (),
            "wave_amplitudes": (),
            "adversarial_steps": 100,
        }
        return cls(
            finetune=plain,
            eps_factors=(1.0,),
            initial="random",
            leave_out=False,
            label_floor=0.0,
            refining_fractions=(),
            **no_turns,
        )

    @property
    def attacks(self) -> tuple[PGDConfig | WaveConfig, ...]:
        """Step 1a, once for each of ``eps_factors``, ``patch_windows``, ``wave_amplitudes`` and ``smooth_grids``."""
        pgd = self.pgd
        whole = [dataclasses.replace(pgd, eps=pgd.eps * f, alpha=pgd.step_size * f) for f in self.eps_factors]
        waves = [WaveConfig(amplitude=amplitude) for amplitude in self.wave_amplitudes]
        smooth = [pgd.smooth(grid, self.smooth_eps) for grid in self.smooth_grids]
        return (*whole, *self.patch_attacks, *waves, *smooth)

    @property
    def patch_attacks(self) -> tuple[PGDConfig, ...]:
        """Those of ``patch_windows``."""
        return tuple(self.pgd.at_will(window) for window in self.patch_windows)
