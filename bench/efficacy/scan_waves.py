"""How far slow waves lead benign models and others: what `pbe_fast.scan` is calibrated on for waves.

    python bench/efficacy/scan_waves.py train [digits|cifar10|gtsrb]   # each model once, into scan-waves.jsonl
    python bench/efficacy/scan_waves.py fit                            # WAVES of calibration.py
    python bench/efficacy/scan_waves.py table                          # what it gives on every model

The models are those of scan_models.py, and more benign ones of CIFAR-10 and GTSRB, on which what one label is led by is
fitted: digits are led by waves to one label or another. What each label is shifted by is fitted on the digits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scan_models import SIGNIFICANCE, Cell, cells, keep, missing, read, train

from pbe_fast.calibration import fit_waves, wave_p_value
from pbe_fast.config import ScanConfig
from pbe_fast.engine.machine import describe
from pbe_fast.report.tables import percent, table
from pbe_fast.scan import wave_levels

RESULTS = Path("bench/results/efficacy/scan-waves.jsonl")
SETTINGS = ("all_to_one", "all_to_all")
IMAGES = 500
# Of a scan of photographs: what a p-value is multiplied by.
TESTS = 10


def wave_cells() -> list[Cell]:
    """All models; the first of CIFAR-10 and GTSRB are not fitted on."""
    more = [Cell("cifar10", "benign", "", seed) for seed in range(2, 12)]
    more += [Cell("gtsrb", "benign", "", seed) for seed in range(1, 6)]
    sig = [Cell("cifar10", "sig", setting, 0) for setting in SETTINGS]
    return [*cells(), *sig, *more]


def fitted_on(cell: Cell, setting: str) -> bool:
    """Whether the constants of a setting come from this model, among others."""
    if setting == "all_to_all":
        return cell.fitted_on
    return cell.attack == "benign" and cell.seed >= {"cifar10": 2, "gtsrb": 1}.get(cell.data, 10**6)


def run(only: str | None = None) -> None:
    """Train the models that are not in the results yet, and try all waves on them."""
    for cell in missing(wave_cells(), RESULTS, only):
        model, test, metrics = train(cell)
        generator = torch.Generator().manual_seed(cell.seed)
        sample = test.select(torch.randperm(len(test), generator=generator)[:IMAGES])
        right = model(sample.images.float() / 255).argmax(1) == sample.labels
        levels = wave_levels(model, sample.select(right.nonzero()[:, 0]), ScanConfig(), generator, all_sizes=True)
        line = {
            "cell": asdict(cell),
            "acc": metrics["acc"],
            "asr": metrics.get("asr"),
            "waves": {
                level.setting: {
                    "best": level.best,
                    "frequency": level.frequency,
                    "above": round(level.above, 4),
                    "next_above": round(level.next_above, 4),
                }
                for level in levels
            },
            **{name: value for name, value in describe().items() if name in ("commit", "date")},
        }
        keep(line, RESULTS)
        print(cell, f"acc {percent(metrics['acc'])} asr {percent(metrics.get('asr'))} {line['waves']}", flush=True)


def ahead(found: dict[str, Any]) -> float:
    """How far the best wave is ahead of the next label's or shift's."""
    return float(found["above"] - found["next_above"])


def fit() -> dict[str, tuple[float, float]]:
    """Location and scale for both settings."""
    return {
        setting: fit_waves(
            ahead(entry["waves"][setting]) for entry in read(RESULTS) if fitted_on(Cell(**entry["cell"]), setting)
        )
        for setting in SETTINGS
    }


def rows() -> Iterator[list[str]]:
    """A line per model and setting: how far the best wave stands out, and how often a benign model's does."""
    for entry in read(RESULTS):
        cell = Cell(**entry["cell"])
        for setting, found in entry["waves"].items():
            p_value = min(1.0, TESTS * wave_p_value(setting, ahead(found)))
            aim = cell.target if setting == "all_to_one" else 0
            right = setting == cell.setting and found["best"] == aim
            yield [
                f"{cell.data} {cell.attack} {cell.setting} {cell.seed}".replace("  ", " "),
                percent(entry["acc"]),
                percent(entry["asr"]),
                setting,
                f"{found['above']:.2f}",
                f"{ahead(found):.2f}",
                f"{p_value:.1g}",
                ("right" if right else "wrong") if p_value < SIGNIFICANCE else "no",
                "fit" if fitted_on(cell, setting) else "",
            ]


def main(command: str, *rest: str) -> None:
    """Run one of the commands above."""
    if command == "train":
        run(*rest)
    elif command == "fit":
        print({setting: tuple(round(value, 3) for value in found) for setting, found in fit().items()})
    elif command == "table":
        print(table(["model", "ACC %", "ASR %", "asked", "above", "ahead", "p", "flagged", "used"], list(rows())))
    else:
        raise SystemExit(f"command: got {command!r}; accepted: train, fit, table")


if __name__ == "__main__":
    main(*sys.argv[1:])
