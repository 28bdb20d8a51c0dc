"""A scale of seconds, and cells that were not measured but made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from pbe_fast.baselines import FineTuningConfig
from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.reproduce import Cell, Plan, Scale

TRAINING = FineTuneConfig(lr=0.05, batch_size=64, augment="none", mix_clean=False, distill_weight=0.0)


@pytest.fixture(scope="session")
def tiny() -> Scale:
    plan = Plan(arch="small_cnn", width=4, epochs=1, training=TRAINING, limit=200, clean_share=0.1, target=3)
    return Scale(
        name="tiny",
        note="for tests",
        plans={"digits": plan},
        stand_in="digits",
        targets=(0, 1),
        pbe=PurifyConfig(
            pgd=PGDConfig(eps=0.1, steps=1),
            finetune=TRAINING,
            adversarial_steps=1,
            clean_steps=1,
            clean_epochs=0,
            fractions=(0.3, 0.6),
            initial="random",
        ),
        baselines={"ft": FineTuningConfig(finetune=TRAINING, epochs=1, min_updates=1)},
        eps=(0.1,),
        feature_eps=0.1,
        attacked=40,
    )


@pytest.fixture
def made_up() -> Callable[..., dict[str, Any]]:
    """The contents of a cell with the given metrics, as far as tables look at them."""

    def make(cell: Cell, scale: Scale, **metrics: Any) -> dict[str, Any]:
        subject = cell.subject
        return {
            "cell": {**dataclasses.asdict(subject), "task": cell.task},
            "metrics": metrics,
            "seconds": 1.0,
            "config": scale.describe(subject.data, subject.attack, subject.setting, cell.task),
            "infection": {"weights": None, "seconds": 2.0},
            "data": {"name": "test", "classes": 10, "train": 200, "clean": 20},
            "commit": "0123456789abcdef",
        }

    return make
