"""Options of an attack: training an infected model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pbe_fast.config.steps import AUGMENT_CHOICES, FineTuneConfig, TrainingConfig
from pbe_fast.options import check, check_types, option


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
