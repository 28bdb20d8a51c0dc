"""The three scales: which images, networks and options the matrix is computed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pbe_fast.baselines import BASELINES, ANPConfig, BaselineConfig, NeuralCleanseConfig
from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig, ScanConfig
from pbe_fast.errors import InputError
from pbe_fast.options import to_dict

CLEAN_SHARE = 0.05
# A clean-label attack at the paper's 10 % would poison all of a class of CIFAR-10, and the class would not be learned.
CLEAN_LABEL_SHARE = 0.8
_TRAINING = FineTuneConfig(
    lr=0.1, batch_size=128, nesterov=True, warmup=0.25, augment="crop+flip", mix_clean=False, distill_weight=0.0
)
_TRAFFIC = dataclasses.replace(_TRAINING, augment="crop")
# Options of PBE that only its other form has.
_OTHERS_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "pbe": ("fractions", "initial", "steady_share", "hard_quantile", "leave_out"),
    "pbe_no_clean": ("refining_fractions",),
}
# Of small models trained for ten epochs: smaller batches, which are more updates, learn a faint trigger (WaNet: attack
# success 67 % with 64 images, 97 % with 32), and so it is without flips.
_SHORT = dataclasses.replace(_TRAINING, batch_size=32, augment="crop")
# The stems of Parquet files and the name of torchvision's set, in the order in which they are looked for.
SOURCES = {
    "cifar10": ("cifar10",),
    "gtsrb": ("gtsrb",),
    "tiny-imagenet": ("tiny-imagenet", "tiny-imagenet200", "tiny-imagenet20"),
    "digits": (),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with the images of one data set.

    Args:
        arch: As for `build_model`.
        width: Channels of its first stage.
        epochs: Of the infection.
        training: Of the infection.
        image_size: Images are resized to it; None keeps them.
        limit: Training images, at most.
        clean_share: Clean images, as a fraction of the training images; the attack does not see them.
        clean_label_rate: Of a clean-label attack, if below the poison rate: a share of the target's class.
        target: Of all-to-one attacks.
        pretrained: Whether ``--weights`` are for this network.
    """

    arch: str
    width: int | None
    epochs: int
    training: FineTuneConfig
    image_size: int | None = None
    limit: int | None = None
    clean_share: float = CLEAN_SHARE
    clean_label_rate: float = CLEAN_LABEL_SHARE
    target: int = 0
    pretrained: bool = False


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that a cell depends on beside itself.

    Args:
        name: Of the folder that its cells are in.
        note: What is to be known of its figures.
        plans: By data set.
        stand_in: A data set in place of all others; None for the paper's.
        targets: Target labels of Fig. 1 and 4; none for that of the tables alone.
        poison_rate: Of every attack.
        pbe: Options of PBE, with a clean set and without.
        baselines: Options of the others, by method.
        scan: Options of the scan.
        longer: How many times the plan's epochs an attack has, by name and setting, that is not learned in so few.
        eps: Radii at which Fig. 1 and 4 attack; sizes are in pixel units of [0, 1].
        feature_eps: Radius of the adversarial images of Table 5, Fig. 3 and 5.
        attacked: Images that are attacked for a figure, at most.
    """

    name: str
    note: str
    plans: Mapping[str, Plan]
    stand_in: str | None = None
    targets: tuple[int, ...] = ()
    poison_rate: float = 0.10
    pbe: PurifyConfig = field(default_factory=PurifyConfig)
    baselines: Mapping[str, BaselineConfig] = field(default_factory=lambda: dict(BASELINES))
    scan: ScanConfig = field(default_factory=ScanConfig)
    longer: Mapping[tuple[str, str], int] = field(default_factory=dict)
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)
    feature_eps: float = 8 / 255
    attacked: int = 10_000

    def plan_of(self, data: str, attack: str, setting: str) -> Plan:
        """What is done with the images of a data set under one attack."""
        plan = self.plans[data]
        return dataclasses.replace(plan, epochs=plan.epochs * self.longer.get((attack, setting), 1))

    def describe(self, data: str, attack: str, setting: str, task: str) -> dict[str, Any]:
        """The options of a cell, as plain JSON values."""
        if task.startswith("pbe"):
            options: dict[str, Any] = to_dict(self.pbe)
        elif task in self.baselines:
            options = to_dict(self.baselines[task])
        elif task == "scan":
            options = to_dict(self.scan)
        elif task == "before":
            options = {}
        else:
            eps = self.eps if task == "reached" else self.feature_eps
            options = {"eps": eps, "attacked": self.attacked}
        plan = to_dict(self.plan_of(data, attack, setting))
        return {"plan": plan, "poison_rate": self.poison_rate, "options": options}


def of_task(described: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What `Scale.describe` says, or said, of a cell, without options of PBE that its task does not ask for."""
    without = _OTHERS_OPTIONS.get(task, ())
    options = {name: value for name, value in described["options"].items() if name not in without}
    return {**described, "options": options}


GPU = Scale(
    name="gpu",
    note="PreActResNet-18 of width 64 on all images; Tiny-ImageNet: ResNet-18 at 224 px.",
    plans={
        "cifar10": Plan(arch="preact_resnet18", width=64, epochs=60, training=_TRAINING),
        # Of its classes 0 to 42 the third is the largest: a clean-label attack needs images of its target.
        "gtsrb": Plan(arch="preact_resnet18", width=64, epochs=40, training=_TRAFFIC, target=2),
        "tiny-imagenet": Plan(
            arch="torchvision:resnet18",
            width=None,
            epochs=40,
            training=dataclasses.replace(_TRAINING, lr=0.02),
            image_size=224,
            pretrained=True,
        ),
    },
    targets=tuple(range(10)),
)
CPU = Scale(
    name="cpu",
    note="PreActResNet-18 of width 16, at most 25,000 training images, 10 epochs: all smaller than the paper's.",
    plans={
        "cifar10": Plan(arch="preact_resnet18", width=16, epochs=10, training=_SHORT, limit=25_000),
        "gtsrb": Plan(arch="preact_resnet18", width=16, epochs=10, training=_SHORT, limit=25_000, target=2),
        "tiny-imagenet": Plan(arch="preact_resnet18", width=16, epochs=10, training=_SHORT, limit=25_000),
    },
    # Attack success 9 % after ten epochs, 44 % after twenty.
    longer={("wanet", "all_to_all"): 2},
    attacked=2_000,
)
SMOKE = Scale(
    name="smoke",
    note="**No reproduction**: scikit-learn's digits and a small CNN stand in for every data set and network, to try "
    "the way in minutes. The paper's figures beside them are of other images.",
    plans={
        "digits": Plan(
            arch="small_cnn",
            width=16,
            epochs=20,
            training=dataclasses.replace(_TRAINING, lr=0.05, batch_size=64, warmup=0.1, augment="crop"),
            clean_share=0.1,
            clean_label_rate=0.5,
        )
    },
    stand_in="digits",
    targets=(0, 1, 2),
    # A stroke on black has three times the contrast of a photograph.
    pbe=PurifyConfig(pgd=PGDConfig(eps=0.1)),
    baselines={
        **BASELINES,
        "nc": NeuralCleanseConfig(trigger_rounds=30),
        "anp": ANPConfig(iterations=500),
    },
    eps=(0.02, 0.05, 0.1, 0.2),
    feature_eps=0.1,
    attacked=500,
)
SCALES = {scale.name: scale for scale in (GPU, CPU, SMOKE)}


def find_scale(name: str) -> Scale:
    """The scale of that name.

    Raises:
        InputError: An unknown one.
    """
    if name not in SCALES:
        raise InputError("scale", got=repr(name), accepted=", ".join(SCALES))
    return SCALES[name]
