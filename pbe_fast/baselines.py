"""The options of the five baselines, as frozen dataclasses: the other ways to purify."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pbe_fast.config import FineTuneConfig
from pbe_fast.options import check, check_types, option

# As in BackdoorBench; augmentation, momentum and weight decay are those of every fine-tuning here.
_BASELINE_TUNING = FineTuneConfig(lr=1e-2, batch_size=256, mix_clean=False, distill_weight=0.0)
# An epoch of a small clean set is a single update: at least as many updates as a round of `PurifyConfig` makes.
_MIN_UPDATES = 250


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Fine-tuning on clean images (`pbe_fast.defenses.fine_tune`)."""

    finetune: FineTuneConfig = option(_BASELINE_TUNING, "fine-tuning")
    epochs: int = option(100, "passes over the clean set, at least")
    min_updates: int = option(_MIN_UPDATES, "updates, at least")

    def __post_init__(self) -> None:
        check_types(self)
        _check_lengths(self)


@dataclass(frozen=True, kw_only=True)
class FinePruningConfig(FineTuningConfig):
    """Fine-pruning (`pbe_fast.defenses.fine_prune`)."""

    held_out: float = option(0.2, "share of the clean set that accuracy is checked on")
    max_drop: float = option(0.10, "accuracy that pruning may cost there, as a fraction of what it was")
    prune_step: float = option(0.01, "units pruned at a time, as a fraction of all")

    def __post_init__(self) -> None:
        check_types(self)
        _check_lengths(self)
        _check_pruning(self)
        check(0 < self.prune_step <= 1, "prune_step", self.prune_step, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class NADConfig:
    """Neural attention distillation (`pbe_fast.defenses.nad`)."""

    finetune: FineTuneConfig = option(_BASELINE_TUNING, "fine-tuning")
    teacher_epochs: int = option(10, "passes over the clean set that make the teacher, at least")
    epochs: int = option(10, "passes over the clean set, at least")
    min_updates: int = option(100, "updates, at least")
    betas: tuple[float, ...] = option((500.0, 1000.0, 1000.0), "weights of the attention loss, last stage last")
    attention_power: float = option(2.0, "power p of the activations in an attention map")

    def __post_init__(self) -> None:
        check_types(self)
        _check_lengths(self)
        check(self.teacher_epochs >= 1, "teacher_epochs", self.teacher_epochs, "1 or more")
        check(len(self.betas) >= 1, "betas", self.betas, "one per stage, at least one")
        check(all(0 <= b < math.inf for b in self.betas), "betas", self.betas, "each 0 or more")
        check(0 < self.attention_power < math.inf, "attention_power", self.attention_power, "above 0")


@dataclass(frozen=True, kw_only=True)
class NeuralCleanseConfig(FineTuningConfig):
    """Neural Cleanse (`pbe_fast.defenses.neural_cleanse`)."""

    trigger_rounds: int = option(80, "rounds of the search for each label's trigger, at most")
    updates_per_round: int = option(10, "updates in each of them")
    trigger_batch: int = option(32, "images per label and update")
    trigger_lr: float = option(0.1, "learning rate of that search (Adam)")
    trigger_success: float = option(0.98, "success rate that a trigger must reach")
    cost: float = option(1e-3, "first weight of the mask's size")
    cost_up: float = option(2.0, "factor by which the weight rises while triggers succeed")
    cost_down: float = option(2.0**1.5, "factor by which it falls while they do not")
    patience: int = option(5, "rounds until the weight moves; five times that without progress end the search")
    outlier_index: float = option(2.0, "anomaly index above which a small mask is a backdoor's")
    stamped: float = option(0.2, "share of the clean images that get the trigger for unlearning")

    def __post_init__(self) -> None:
        check_types(self)
        _check_lengths(self)
        for name in ("trigger_rounds", "updates_per_round", "trigger_batch", "patience"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(0 < self.trigger_lr < math.inf, "trigger_lr", self.trigger_lr, "above 0")
        check(0 < self.trigger_success <= 1, "trigger_success", self.trigger_success, "above 0 and at most 1")
        check(0 < self.cost < math.inf, "cost", self.cost, "above 0")
        for name in ("cost_up", "cost_down"):
            check(1 < getattr(self, name) < math.inf, name, getattr(self, name), "above 1")
        check(0 < self.outlier_index < math.inf, "outlier_index", self.outlier_index, "above 0")
        check(0 < self.stamped <= 1, "stamped", self.stamped, "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ANPConfig:
    """Adversarial neuron pruning (`pbe_fast.defenses.anp`)."""

    batch_size: int = option(128, "images per update")
    augment: str = option("crop", "augmentation", ("none", "crop", "crop+flip"))
    iterations: int = option(2000, "updates of the masks")
    mask_lr: float = option(0.2, "their learning rate (SGD with momentum 0.9)")
    perturbation: float = option(0.4, "largest relative change of a channel's BN weight and bias")
    perturbation_steps: int = option(1, "steps to find the worst one")
    clean_weight: float = option(0.2, "weight of the unperturbed loss; the perturbed one has the rest")
    held_out: float = option(0.2, "share of the clean set that accuracy is checked on")
    max_drop: float = option(0.05, "accuracy that pruning may cost there, as a fraction of what it was")
    max_threshold: float = option(0.9, "largest mask value that may be pruned")
    threshold_step: float = option(0.05, "step between the thresholds that are tried")

    def __post_init__(self) -> None:
        check_types(self)
        check(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        check(self.augment in ("none", "crop", "crop+flip"), "augment", self.augment, "none, crop, crop+flip")
        for name in ("iterations", "perturbation_steps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(0 < self.mask_lr < math.inf, "mask_lr", self.mask_lr, "above 0")
        check(0 <= self.perturbation < math.inf, "perturbation", self.perturbation, "0 or more")
        check(0 <= self.clean_weight <= 1, "clean_weight", self.clean_weight, "0 to 1")
        _check_pruning(self)
        check(0 <= self.max_threshold < 1, "max_threshold", self.max_threshold, "0 up to 1")
        check(0 < self.threshold_step <= 1, "threshold_step", self.threshold_step, "above 0 and at most 1")


def _check_lengths(config: FineTuningConfig | NADConfig) -> None:
    check(config.epochs >= 1, "epochs", config.epochs, "1 or more")
    check(config.min_updates >= 0, "min_updates", config.min_updates, "0 or more")


def _check_pruning(config: FinePruningConfig | ANPConfig) -> None:
    check(0 < config.held_out < 1, "held_out", config.held_out, "a fraction between 0 and 1")
    check(0 <= config.max_drop < 1, "max_drop", config.max_drop, "0 up to 1")


BaselineConfig = FineTuningConfig | NADConfig | ANPConfig

# By the name of --method; `pbe_fast.defenses.DEFENSES` holds the functions.
BASELINES: dict[str, BaselineConfig] = {
    "ft": FineTuningConfig(),
    "fp": FinePruningConfig(),
    "nad": NADConfig(),
    "nc": NeuralCleanseConfig(),
    "anp": ANPConfig(),
}
METHOD_NAMES = {
    "pbe": "PBE",
    "ft": "fine-tuning",
    "fp": "fine-pruning",
    "nad": "NAD",
    "nc": "Neural Cleanse",
    "anp": "ANP",
}
