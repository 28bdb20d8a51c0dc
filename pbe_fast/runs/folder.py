"""The folder of a run: what is written to it, in which order, and what is added later."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbe_fast.attack import InfectedModel
from pbe_fast.data import ImageSet, save_npz
from pbe_fast.engine.files import replacing, write_text
from pbe_fast.engine.machine import describe
from pbe_fast.models import ModelSpec, save_model
from pbe_fast.models.io import CONFIG_NAME, WEIGHTS_NAME
from pbe_fast.options import to_dict
from pbe_fast.poison import triggered_test_set
from pbe_fast.report.html import write_html
from pbe_fast.report.tables import named_models
from pbe_fast.result import (
    DERIVED,
    REPORT_NAME,
    PurifyResult,
    merged,
    plain,
    read_report,
    sha256_of_file,
    write_report,
)
from pbe_fast.runs.networks import UNKNOWN
from pbe_fast.runs.sources import CLEAN_NAME, TEST_NAME, TRAIN_NAME, TRIGGERED_NAME, Source
from pbe_fast.runs.triggers import TRIGGER_NAME, save_trigger_weights

INDICES_NAME = "poison_indices.json"
FIGURE_NAME, PAGE_NAME = "figure.png", "report.html"


class Clock:
    """Seconds by phase, and in all."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's time to that of phase ``name``."""
        start = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; "total" since the clock was made."""
        return {**self._phases, "total": time.perf_counter() - self._start}


def describe_inputs(models: Mapping[str, Path], sources: Mapping[str, Source | None]) -> dict[str, Any]:
    """The digests of a run's inputs: weights files (or the folders that hold them) and image sets."""
    files = {name: path / WEIGHTS_NAME if path.is_dir() else path for name, path in models.items()}
    return {
        **{name: {"source": str(path), "sha256": sha256_of_file(path)} for name, path in files.items()},
        **{name: source.describe() for name, source in sources.items() if source is not None},
    }


def provenance(models: Mapping[str, Path], sources: Mapping[str, Source | None], *outputs: Path) -> dict[str, Any]:
    """What a report says of the inputs, the outputs and the machine."""
    digests: dict[str, Any] = {"inputs": describe_inputs(models, sources)}
    if outputs:
        digests["outputs"] = {str(path): sha256_of_file(path) for path in outputs}
    return {"sha256": digests, **plain(describe())}


def save_infected(
    folder: Path,
    infected: InfectedModel,
    spec: ModelSpec,
    *,
    test: ImageSet | None = None,
    clean: ImageSet | None = None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Write all that an attack leaves, the report last.

    Args:
        folder: Open for writing; see `prepare_output`.
        infected: What `train_infected` returned.
        spec: Of its model.
        test: Clean test images; they and their triggered copies are written.
        clean: Images kept from the attack, for a purification with a clean set.
        report: Further entries of ``report.json``.

    Returns:
        The report.
    """
    config, trigger = infected.config, infected.trigger
    sets = {TRAIN_NAME: infected.train_data, CLEAN_NAME: clean, TEST_NAME: test, TRIGGERED_NAME: None}
    if test is not None:
        sets[TRIGGERED_NAME] = triggered_test_set(
            test, trigger, setting=config.setting, target_label=config.target_label
        )
    attack = {"trigger": trigger.spec(), "setting": config.setting, "target_label": config.target_label}
    mask = infected.train_data.poison_mask
    assert mask is not None
    indices = mask.nonzero()[:, 0].tolist()
    own = {
        "attack": attack,
        "losses": infected.losses,
        "config": to_dict(config),
        "seed": infected.seed,
        "train": {"images": len(infected.train_data), "poisoned": len(indices), "clean_kept": len(clean or ())},
        **describe(),
    }
    with replacing(folder, last=REPORT_NAME, stale=(*DERIVED, *sets, TRIGGER_NAME)) as new:
        save_model(infected.model, spec, new, extra={"role": "infected", "attack": attack})
        names = [WEIGHTS_NAME, CONFIG_NAME, INDICES_NAME, *save_trigger_weights(trigger, new)]
        for name, data in sets.items():
            if data is not None:
                save_npz(data, new / name)
                names.append(name)
        write_text(new / INDICES_NAME, json.dumps({"count": len(indices), "indices": indices}) + "\n")
        return write_report(new, {**report, **merged(own, report)}, outputs=names)


def illustrate(
    folder: Path, result: PurifyResult, test: ImageSet | None = None, triggered: ImageSet | None = None
) -> dict[str, Any]:
    """Draw a saved run's figure, where it has a ranking and test images, and write its page; returns the report."""
    from pbe_fast.report.figure import MAX_IMAGES, draw_figure  # matplotlib takes a second to import

    report = read_report(folder) or {}
    if result.ranking is not None and result.train_data is not None and test is not None:
        train = result.train_data
        shown = result.ranking.order.flip(0)[:MAX_IMAGES]
        sets = {"clean": test, "triggered": triggered, "suspected": train.select(shown).to("cpu")}
        rows = {name: data.select(range(min(MAX_IMAGES, len(data)))) for name, data in sets.items() if data is not None}
        draw_figure(
            folder / FIGURE_NAME,
            models=named_models(models_of(report), result.method),
            scores=result.ranking.score.cpu(),
            poison_mask=None if train.poison_mask is None else train.poison_mask.cpu(),
            images={name: data.images for name, data in rows.items()},
            captions={name: [data.class_names[k] for k in data.labels.tolist()] for name, data in rows.items()},
        )
        report = write_report(folder, report, outputs=[FIGURE_NAME])
    _write_page(folder, report)
    return report


def models_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a report that are metrics of a model."""
    return {
        name: entry for name, entry in report.items() if isinstance(entry, Mapping) and UNKNOWN.keys() <= entry.keys()
    }


def add_to_report(folder: Path, outputs: Iterable[str] = (), **entries: Any) -> bool:
    """Put entries, and digests of files, into the report and the page of a run; False where there is no report."""
    report = read_report(folder)
    if report is None:
        return False
    report = write_report(folder, merged(report, entries), outputs=outputs)
    if (folder / PAGE_NAME).exists():
        _write_page(folder, report)
    return True


def _write_page(folder: Path, report: Mapping[str, Any]) -> None:
    """The page, with the pictures that the report counts among its outputs."""
    pictures = [name for name in report["sha256"]["outputs"] if name.endswith(".png")]
    write_html(
        folder / PAGE_NAME,
        report,
        [folder / name for name in pictures if name == FIGURE_NAME],
        [folder / name for name in pictures if name != FIGURE_NAME],
    )
