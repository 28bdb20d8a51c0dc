"""Every option of the package, as frozen dataclasses with defaults that work.

The command line builds its flags from these fields (``help`` and ``choices`` in their metadata), and reports
store them as `pbe_fast.options.to_dict` gives them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pbe_fast.options import check, check_types, option

# Sides of windows that a scan is calibrated for, as shares of the image's.
CALIBRATED_WINDOWS = (0.125, 0.25)
AUGMENT_CHOICES = ("none", "crop", "crop+flip", "auto")


def _check_radius(norm: str, eps: float) -> None:
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
    random_start: bool = option(False, "start at a random point of the ball")
    restarts: int = option(1, "random starts or windows per image; the one that reaches the highest loss counts")
    early_stop: bool = option(False, "leave an image alone as soon as it is misclassified")
    compile: str = option("auto", "compile the attacked network; auto: if the work pays for it", ("auto", "on", "off"))

    def __post_init__(self) -> None:
        check_types(self)
        check(self.norm in ("linf", "l2"), "norm", self.norm, "linf, l2")
        _check_radius(self.norm, self.eps)
        check(self.alpha is None or 0 < self.alpha < math.inf, "alpha", self.alpha, "above 0")
        check(self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.window is None or 0 < self.window <= 1, "window", self.window, "above 0 and at most 1")
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
        return dataclasses.replace(self, norm="linf", eps=1.0, alpha=max(0.25, 1 / self.steps), window=window)

    @property
    def step_size(self) -> float:
        """``alpha``, or its default."""
        return self.eps / 4 if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class WaveConfig:
    """Random plane waves (`pbe_fast.waves`), in place of an attack."""

    amplitude: float = option(0.2, "amplitude, in pixel units of [0, 1]")
    max_cycles: float = option(8.0, "highest frequency along each axis, in periods over the image")

    def __post_init__(self) -> None:
        check_types(self)
        check(0 < self.amplitude < math.inf, "amplitude", self.amplitude, "above 0")
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
    wave_amplitudes: tuple[float, ...] = option(
        (0.2, 0.2),
        "further turns of step 1b: random plane waves of these amplitudes, in pixel units of [0, 1], the way to a "
        "trigger that is spread over all pixels (none: no such turns)",
    )
    adversarial_steps: int = option(
        140, "updates of step 1b in each round, which its turns share; fewer than there are turns leave some out"
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
        0.3, "where no label is found: the most fragile images, which later extra sets leave out (0: none)"
    )
    hard_quantile: float = option(0.3, "how much of each label counts as hard")
    label_floor: float = option(
        0.5,
        "without a clean set: what every label gives to an extra set at least, as a share of what it gave if all gave "
        "alike (0: the paper)",
    )
    leave_out: bool = option(
        True,
        "with initial steady, where no label attracts: purify twice without images of half of the labels, to see of "
        "which label the model changes most, and leave that one out of the first extra set (of eight labels and more)",
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
        no_turns: dict[str, Any] = {"patch_windows": (), "wave_amplitudes": (), "adversarial_steps": 100}
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
        """Step 1a, once for each of ``eps_factors``, of ``patch_windows`` and of ``wave_amplitudes``."""
        pgd = self.pgd
        whole = [dataclasses.replace(pgd, eps=pgd.eps * f, alpha=pgd.step_size * f) for f in self.eps_factors]
        waves = [WaveConfig(amplitude=amplitude) for amplitude in self.wave_amplitudes]
        return (*whole, *self.patch_attacks, *waves)

    @property
    def patch_attacks(self) -> tuple[PGDConfig, ...]:
        """Those of ``patch_windows``."""
        return tuple(self.pgd.at_will(window) for window in self.patch_windows)


@dataclass(frozen=True, kw_only=True)
class InputAwareConfig:
    """The networks that draw the trigger of the input-aware dynamic attack."""

    mask_share: float = option(0.2, "epochs of the mask network, as a fraction of the epochs; they come first")
    mask_density: float = option(0.032, "value up to which a mask's pixels cost nothing")
    mask_lr: float = option(1e-2, "learning rate of the mask network (Adam)")
    generator_lr: float = option(1e-2, "learning rate of the pattern generator (Adam)")
    lambda_div: float = option(1.0, "weight of the diversity losses")
    lambda_norm: float = option(100.0, "weight of the density loss")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("mask_share", "mask_lr", "generator_lr"):
            check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        check(0 <= self.mask_density < 1, "mask_density", self.mask_density, "0 up to 1")
        for name in ("lambda_div", "lambda_norm"):
            check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Looking for a backdoor (`pbe_fast.scan`). Sizes are in pixel units of [0, 1]."""

    norm: str = option("linf", "norm of the ball", ("linf", "l2"))
    eps: tuple[float, ...] = option(
        tuple(level / 255 for level in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        "radii of the ball, rising; three of them are tested, by how many images they move",
    )
    patch_windows: tuple[float, ...] = option(
        CALIBRATED_WINDOWS,
        "sides of windows, as shares of the image's: the attack changes a random one of each image at will, which is "
        "the way to a patch; each is one more test for all-to-one (none: no such test)",
    )
    steps: int = option(5, "number of steps, each of a quarter of eps")
    images: int = option(500, "images to attack, at most")
    significance: float = option(0.01, "p-value below which a backdoor is reported")

    def __post_init__(self) -> None:
        check_types(self)
        check(self.norm in ("linf", "l2"), "norm", self.norm, "linf, l2")
        check(len(self.eps) >= 1, "eps", self.eps, "at least one radius")
        for eps in self.eps:
            _check_radius(self.norm, eps)
        check(list(self.eps) == sorted(set(self.eps)), "eps", self.eps, "rising")
        # Of other windows nobody knows how uneven benign models are.
        known = set(self.patch_windows) <= set(CALIBRATED_WINDOWS)
        once = len(set(self.patch_windows)) == len(self.patch_windows)
        accepted = f"of {', '.join(map(str, CALIBRATED_WINDOWS))}, each once, or none"
        check(known and once, "patch_windows", self.patch_windows, accepted)
        check(self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.images >= 1, "images", self.images, "1 or more")
        check(0 < self.significance < 1, "significance", self.significance, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Training an infected model."""

    attack: str = option("blend", "the attack", ("badnets", "blend", "sig", "wanet", "input_aware"))
    setting: str = option("all_to_one", "one target label, or y + 1", ("all_to_one", "all_to_all"))
    target_label: int = option(0, "the label that all-to-one aims at")
    poison_rate: float = option(0.10, "poisoned images as a fraction of the training set")
    epochs: int = option(10, "epochs of training")
    training: FineTuneConfig = option(
        TrainingConfig(lr=0.1, batch_size=32, nesterov=True, warmup=0.25, mix_clean=False, distill_weight=0.0),
        "its SGD",
    )
    input_aware: InputAwareConfig = option(InputAwareConfig(), "networks of --attack input_aware")

    def __post_init__(self) -> None:
        check_types(self)
        check(self.setting in ("all_to_one", "all_to_all"), "setting", self.setting, "all_to_one, all_to_all")
        check(0 < self.poison_rate < 1, "poison_rate", self.poison_rate, "a fraction between 0 and 1")
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        known = AUGMENT_CHOICES[:-1]
        check(self.training.augment in known, "augment", self.training.augment, f"{', '.join(known)} in an attack")
