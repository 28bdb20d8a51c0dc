"""Options of the steps that everything is made of: PGD, waves, fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from pbe_fast.options import check, check_types, option

AUGMENT_CHOICES = ("none", "crop", "crop+flip", "auto")


def check_radius(norm: str, eps: float) -> None:
    """Refuses a radius that is none; and of a box one beyond which there is no picture, mostly meant as levels of 255.

    What an l2 ball may hold depends on the size of the images.
    """
    check(0 < eps < math.inf, "eps", eps, "above 0")
    accepted = f"at most 1, in pixel units of [0, 1]; {eps:g} levels of 255 are {eps:g}/255 = {eps / 255:.3g}"
    check(norm != "linf" or eps <= 1, "eps", eps, accepted)


@dataclass(frozen=True, kw_only=True)
class PGDConfig:
    """Untargeted PGD (step 1a). Sizes are in pixel units of [0, 1]."""

    norm: str = option("linf", "norm of the ball", ("linf", "l2"))
    eps: float = option(12 / 255, "radius of the ball, in pixel units of [0, 1]")
    alpha: float | None = option(None, "step size; a quarter of eps if not given")
    steps: int = option(5, "number of steps")
    window: float | None = option(
        None, "change one random window of each image, of this share of its shorter side, instead of all of it"
    )
    grid: int | None = option(
        None, "change a grid of so many values along each axis, spread smoothly over the image, instead of its pixels"
    )
    random_start: bool = option(False, "start at a random point of the ball")
    restarts: int = option(1, "random starts or windows per image; the one that reaches the highest loss counts")
    early_stop: bool = option(False, "leave an image alone as soon as it is misclassified")
    compile: str = option("auto", "compile the attacked network; auto: if the work pays for it", ("auto", "on", "off"))

    def __post_init__(self) -> None:
        check_types(self)
        check(self.norm in ("linf", "l2"), "norm", self.norm, "linf, l2")
        check_radius(self.norm, self.eps)
        check(self.alpha is None or 0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        check(self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.window is None or 0 < self.window <= 1, "window", self.window, "above 0 and at most 1")
        check(self.grid is None or self.grid >= 1, "grid", self.grid, "1 or more")
        if self.grid is not None:
            alone = "with norm linf, and neither a window nor a random start"
            check(self.norm == "linf" and not self.draws, "grid", self.grid, alone)
        check(1 <= self.restarts <= 256, "restarts", self.restarts, "1 to 256")
        alone = "1, or more with random_start=True (--random-start) or a window"
        check(self.restarts == 1 or self.draws, "restarts", self.restarts, alone)
        check(self.compile in ("auto", "on", "off"), "compile", self.compile, "auto, on, off")

    @property
    def draws(self) -> bool:
        """Whether its images depend on random numbers."""
        return self.random_start or self.window is not None

    @property
    def passes(self) -> int:
        """Work per image, in forward passes: each step also goes back to the image."""
        return 2 * self.steps

    def at_will(self, window: float) -> PGDConfig:
        """The attack on windows of that share of the side: in four steps, or all if fewer, a pixel takes any value."""
        return dataclasses.replace(
            self, norm="linf", eps=1.0, alpha=max(0.25, 1 / self.steps), window=window, grid=None
        )

    def smooth(self, grid: int, eps: float) -> PGDConfig:
        """The attack on a grid of values within ``eps``; in four steps, or all if fewer, a value goes all the way."""
        alpha = eps * max(0.25, 1 / self.steps)
        return dataclasses.replace(
            self, norm="linf", eps=eps, alpha=alpha, grid=grid, window=None, random_start=False, restarts=1
        )

    @property
    def step_size(self) -> float:
        """``alpha``, or its default."""
        return self.eps / 4 if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class WaveConfig:
    """Random plane waves (`pbe_fast.waves`), in place of an attack."""

    amplitude: float = option(0.2, "amplitude, in pixel units of [0, 1]")
    max_cycles: float = option(8.0, "highest frequency along each axis, in periods over the image")
    near: tuple[tuple[int, int], ...] = option(
        (),
        "frequencies (down, across), in periods over the image, that half of the waves lie within one period of",
    )

    def __post_init__(self) -> None:
        check_types(self)
        check(0 < self.amplitude < math.inf, "amplitude", self.amplitude, "above 0")
        check(all(len(pair) == 2 for pair in self.near), "near", self.near, "pairs: down, across")
        check(0 < self.max_cycles < math.inf, "max_cycles", self.max_cycles, "above 0")

    @property
    def draws(self) -> bool:
        """Whether its images depend on random numbers."""
        return True

    @property
    def passes(self) -> int:
        """Work per image, in forward passes."""
        return 0


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """SGD of the fine-tuning steps (1b and 2)."""

    lr: float = option(2e-2, "peak learning rate")
    batch_size: int = option(128, "images per update")
    momentum: float = option(0.9, "momentum")
    weight_decay: float = option(5e-4, "weight decay")
    nesterov: bool = option(False, "Nesterov momentum")
    warmup: float = option(0.0, "share of the updates over which the learning rate rises")
    augment: str = option(
        "crop",
        "augmentation: none, crop (random shifts), crop+flip, or auto: flips where the model keeps its answers",
        AUGMENT_CHOICES,
    )
    mix_clean: bool = option(True, "put the unperturbed images beside the adversarial ones in every batch")
    distill_weight: float = option(
        1.0, "weight of keeping the infected model's logits on trusted clean images; 0 is the paper"
    )
    distill_temperature: float = option(2.0, "temperature of that term")

    def __post_init__(self) -> None:
        check_types(self)
        check(0 < self.lr < math.inf, "lr", self.lr, "above 0")
        check(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        check(0 <= self.momentum < 1, "momentum", self.momentum, "0 up to 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(0 <= self.warmup <= 1, "warmup", self.warmup, "0 to 1")
        check(self.augment in AUGMENT_CHOICES, "augment", self.augment, ", ".join(AUGMENT_CHOICES))
        check(self.distill_weight >= 0, "distill_weight", self.distill_weight, "0 or more")
        check(self.distill_temperature > 0, "distill_temperature", self.distill_temperature, "above 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(FineTuneConfig):
    """SGD of an attack, which has no model yet that "auto" could ask whether images may be mirrored."""

    augment: str = option("crop", "augmentation: none, crop (random shifts) or crop+flip", AUGMENT_CHOICES[:-1])
