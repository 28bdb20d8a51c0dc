"""What `pbe_fast.scan` is calibrated on, and how well it does: small models, benign and infected, trained and scanned.

    python bench/efficacy/scan_models.py train [digits|cifar10|gtsrb]   # each model once, into scan-models.jsonl
    python bench/efficacy/scan_models.py fit                            # the constants of calibration.py
    python bench/efficacy/scan_models.py table                          # what they give on every model

The digits come with scikit-learn; the others are read from the folder that PBE_FAST_DATA names. A run that was stopped
goes on where it was. The constants are fitted on the benign digits models of seeds 0 to 19 alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbe_fast import runs
from pbe_fast.attack import train_infected
from pbe_fast.calibration import fit_concentration
from pbe_fast.config import AttackConfig, FineTuneConfig, ScanConfig
from pbe_fast.data import ImageSet, as_image_set, split
from pbe_fast.engine.machine import describe
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.metrics import evaluate
from pbe_fast.poison import triggered_test_set
from pbe_fast.report.tables import percent, table
from pbe_fast.scan import ScanLevel, most_suspicious, scan

RESULTS = Path("bench/results/efficacy/scan-models.jsonl")
SIGNIFICANCE = ScanConfig().significance
ATTACKS, SETTINGS = ("badnets", "blend", "sig", "wanet"), ("all_to_one", "all_to_all")
# Another kind of image: 6,000 of them, 8 epochs of the real network at width 8, a minute each on one core.
LARGE = FineTuneConfig(lr=0.1, batch_size=64, nesterov=True, warmup=0.05, mix_clean=False, distill_weight=0.0)


@dataclass(frozen=True)
class Cell:
    """One model; ``attack`` is "benign" or the name of one."""

    data: str
    attack: str
    setting: str
    seed: int

    @property
    def target(self) -> int:
        """The label that all-to-one aims at."""
        return 3 * self.seed + 1

    @property
    def fitted_on(self) -> bool:
        """Whether the constants come from this model, among others."""
        return self.data == "digits" and self.attack == "benign" and self.seed < 20


def cells() -> list[Cell]:
    """All models."""
    digits = [Cell("digits", "benign", "", seed) for seed in range(40)]
    digits += [Cell("digits", a, setting, seed) for setting in SETTINGS for a in ATTACKS for seed in range(3)]
    cifar = [*(Cell("cifar10", "benign", "", seed) for seed in range(2)), Cell("cifar10", "blend", "all_to_one", 0)]
    gtsrb = [Cell("gtsrb", "benign", "", 0), Cell("gtsrb", "blend", "all_to_one", 1)]
    return [*digits, *cifar, *gtsrb]


def train(cell: Cell) -> tuple[nn.Module, ImageSet, dict[str, Any]]:
    """The model, its test images, and its accuracy and attack success rate.

    Benign models differ in width, length, number of images and augmentation, as users' models do.
    """
    data, test = _images(cell.data)
    infected = cell.attack != "benign"
    if cell.data == "digits":
        width = 16 if infected else (8, 16, 16)[cell.seed % 3]
        epochs = 30 if infected else (12, 20, 30)[cell.seed % 3]
        images = (len(data), 1100)[cell.seed % 2]
        augment = ("crop", "crop", "none")[cell.seed // 2 % 3]
        arch, training = "small_cnn", replace(LARGE, lr=0.05, augment=augment)
    else:
        arch, width, epochs, images = "preact_resnet18", 8, 8, 6000
        training = replace(LARGE, augment="crop" if cell.data == "gtsrb" else "crop+flip")
    if images < len(data):
        data, _ = split(data, images, seed=cell.seed)
    model, _ = runs.new_model(arch, data, width=width, seed=cell.seed)
    if not infected:
        steps = epochs * steps_per_epoch(len(data), training.batch_size)
        generator = torch.Generator().manual_seed(cell.seed)
        model = model.to(memory_format=torch.channels_last)
        FineTuner(model, training, total_steps=steps, generator=generator).run(data, steps=steps)
        return model.eval(), test, evaluate(model, test).to_dict()
    # A clean-label attack has one class to poison, a tenth of the images: it cannot take all of it.
    rate = 0.05 if (cell.attack, cell.setting) == ("sig", "all_to_one") else 0.1
    config = AttackConfig(
        attack=cell.attack,
        setting=cell.setting,
        target_label=cell.target,
        poison_rate=rate,
        epochs=epochs,
        training=training,
    )
    made = train_infected(model, data, config=config, seed=cell.seed, precision="fp32", progress=False)
    triggered = triggered_test_set(test, made.trigger, setting=cell.setting, target_label=cell.target)
    return made.model, test, evaluate(made.model, test, triggered).to_dict()


def _images(name: str) -> tuple[ImageSet, ImageSet]:
    if name == "digits":
        return as_image_set("digits:train"), as_image_set("digits:test")
    folder = Path(os.environ["PBE_FAST_DATA"])
    data, test = (as_image_set(folder / f"{name}-{part}.parquet", progress=False) for part in ("train", "test"))
    return data, split(test, 2000, seed=0)[0]


def run(only: str | None = None) -> None:
    """Train and scan the models that are not in the results yet."""
    for cell in missing(cells(), RESULTS, only):
        model, test, metrics = train(cell)
        found = scan(model, test, seed=cell.seed, precision="fp32", progress=False)
        levels = [{"name": v.name, "eps": v.eps, "window": v.window, "counts": v.counts.tolist()} for v in found.levels]
        line = {
            "cell": asdict(cell),
            "acc": metrics["acc"],
            "asr": metrics.get("asr"),
            "images": found.images,
            "levels": levels,
            **{name: value for name, value in describe().items() if name in ("commit", "date")},
        }
        keep(line, RESULTS)
        print(cell, f"acc {percent(metrics['acc'])} asr {percent(metrics.get('asr'))} {found.summary()}", flush=True)


def read(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The results, one entry per model."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def missing(wanted: Iterable[Cell], results: Path, only: str | None) -> Iterator[Cell]:
    """The models, of all data or of one kind, that are not in the results yet."""
    done = {Cell(**entry["cell"]) for entry in read(results)}
    return (cell for cell in wanted if cell not in done and only in (None, cell.data))


def keep(line: Mapping[str, Any], results: Path) -> None:
    """One more entry."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def levels_of(entry: Mapping[str, Any]) -> tuple[ScanLevel, ...]:
    """The counts of one model as `scan` made them."""
    return tuple(ScanLevel(v["name"], v["eps"], torch.tensor(v["counts"]), v["window"]) for v in entry["levels"])


def fit() -> dict[tuple[str, str], float]:
    """The concentration for every setting and level, from the benign models set aside for it."""
    seen = defaultdict(list)
    for entry in read():
        if Cell(**entry["cell"]).fitted_on:
            for level in levels_of(entry):
                for setting in level.settings:
                    seen[setting, str(level.name)].append(level.largest(setting))
    return {key: round(fit_concentration(largest), 2) for key, largest in sorted(seen.items())}


def rows() -> Iterator[list[str]]:
    """A line per model: what it is, and what a scan says of it."""
    for entry in read():
        cell = Cell(**entry["cell"])
        level, setting, p_value = most_suspicious(levels_of(entry))
        at = int(level.shares(setting).argmax()) + (setting == "all_to_all")
        flagged = p_value < SIGNIFICANCE
        right = flagged and setting == cell.setting and at == (cell.target if setting == "all_to_one" else 1)
        yield [
            f"{cell.data} {cell.attack} {cell.setting} {cell.seed}".replace("  ", " "),
            percent(entry["acc"]),
            percent(entry["asr"]),
            f"{level.largest(setting).times_even:.1f}",
            f"{p_value:.1g}",
            ("right" if right else "wrong") if flagged else "no",
            "fit" if cell.fitted_on else "",
        ]


def main(command: str, *rest: str) -> None:
    """Run one of the commands above."""
    if command == "train":
        run(*rest)
    elif command == "fit":
        for (setting, level), value in fit().items():
            print(f'("{setting}", "{level}"): {value},')
    elif command == "table":
        print(table(["model", "ACC %", "ASR %", "times even", "p", "flagged", "used"], list(rows())))
    else:
        raise SystemExit(f"command: got {command!r}; accepted: train, fit, table")


if __name__ == "__main__":
    main(*sys.argv[1:])
