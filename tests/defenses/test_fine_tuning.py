from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pbe_fast.baselines import BASELINES, FineTuningConfig
from pbe_fast.defenses import DEFENSES, fine_tune


@pytest.mark.parametrize("method", ["ft", "fp", "nad"])
def test_auto_asks_the_infected_model_whether_to_mirror(infected: Any, method: str) -> None:
    # What neural_cleanse unlearns with is the same call. Digits do not look alike in a mirror.
    config = BASELINES[method]
    tuning = dataclasses.replace(config.finetune, augment="auto")
    short = {"finetune": tuning, "epochs": 1, "min_updates": 1, **({"teacher_epochs": 1} if method == "nad" else {})}
    config = dataclasses.replace(config, **short)
    defense = DEFENSES[method]
    result = defense(infected.model, infected.clean, config=config, device="cpu", precision="fp32", progress=False)
    tuned = [entry["augment"] for entry in result.history if "updates" in entry]
    assert tuned == ["crop"] * (2 if method == "nad" else 1)


@pytest.mark.parametrize(("epochs", "at_least", "updates"), [(1, 5, 5), (4, 5, 8), (3, 0, 6)])
def test_as_many_updates_as_epochs_or_the_minimum_make(infected: Any, epochs: int, at_least: int, updates: int) -> None:
    tuning = dataclasses.replace(BASELINES["ft"].finetune, batch_size=70)
    config = FineTuningConfig(finetune=tuning, epochs=epochs, min_updates=at_least)
    result = fine_tune(infected.model, infected.clean, config=config, device="cpu", precision="fp32", progress=False)
    (entry,) = result.history
    assert (entry["updates"], entry["images"]) == (updates, 140)
    before = int(infected.model.net.bn1.num_batches_tracked)
    assert int(result.model.net.bn1.num_batches_tracked) - before == updates
