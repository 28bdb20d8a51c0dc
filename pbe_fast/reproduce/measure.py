"""One cell: a defence and what it is worth, or the evidence behind a figure."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast import runs
from pbe_fast.defenses import DEFENSES
from pbe_fast.engine.machine import describe
from pbe_fast.purify import purify
from pbe_fast.ranking import Ranking
from pbe_fast.reproduce.cells import Cell
from pbe_fast.reproduce.evidence import measure_features, measure_reached, measure_tsne
from pbe_fast.reproduce.workshop import Prepared, Workshop
from pbe_fast.result import PurifyResult
from pbe_fast.scan import scan

RECALLS = 101


def measure_cell(cell: Cell, workshop: Workshop) -> dict[str, Any]:
    """The contents of a cell's file; its models have to be there.

    Returns:
        ``cell``, ``scale``, ``config``, ``data``, ``metrics`` (fractions in [0, 1]), what the task adds, ``seconds``,
        and versions, machine, commit and date.
    """
    prepared = workshop.open(cell.subject)
    start = time.perf_counter()
    found = _measure(cell, workshop, prepared)
    subject = cell.subject
    return {
        "cell": {
            "data": subject.data,
            "attack": subject.attack,
            "setting": subject.setting,
            "target": subject.target,
            "seed": subject.seed,
            "task": cell.task,
        },
        "scale": workshop.scale.name,
        **found,
        "seconds": time.perf_counter() - start,
        "config": workshop.scale.describe(subject.data, subject.attack, subject.setting, cell.task),
        "infection": {
            name: prepared.record.get(name) for name in ("config", "trigger", "losses", "seconds", "weights", "commit")
        },
        "data": {
            "name": prepared.test.name,
            "classes": prepared.test.num_classes,
            "image_shape": prepared.test.image_shape,
            **{name: len(getattr(prepared, name)) for name in ("train", "clean", "test")},
        },
        **describe(),
    }


def _measure(cell: Cell, workshop: Workshop, prepared: Prepared) -> dict[str, Any]:
    seed = cell.subject.seed
    if cell.task == "before":
        return {"metrics": _metrics(prepared.model, prepared, workshop)}
    if cell.task == "reached":
        return measure_reached(prepared, workshop, seed=seed)
    if cell.task in ("features", "tsne"):
        benign = workshop.open(cell.subject.benign())
        evidence = measure_features if cell.task == "features" else measure_tsne
        return evidence(benign.model, prepared, workshop, seed=seed)
    if cell.task == "scan":
        return _scan(prepared, workshop, seed=seed)
    if cell.task in DEFENSES:
        result = DEFENSES[cell.task](
            prepared.model,
            prepared.clean,
            config=workshop.scale.baselines[cell.task],
            seed=seed,
            **workshop.running(),
        )
        return _of_result(result, prepared, workshop)
    return _run_pbe(prepared, workshop, with_clean=cell.task == "pbe", seed=seed)


def _run_pbe(prepared: Prepared, workshop: Workshop, *, with_clean: bool, seed: int) -> dict[str, Any]:
    """PBE, and by round what Fig. 6 and 7 draw; the algorithm does not see these."""
    progress: list[dict[str, Any]] = []

    def look(t: int, model: nn.Module, ranking: Ranking | None) -> None:
        entry: dict[str, Any] = {"round": t, **_metrics(model, prepared, workshop)}
        if ranking is not None and prepared.train.poison_mask is not None:
            poisoned = prepared.train.poison_mask.to(ranking.order.device)
            entry["poisoned_share"] = float(poisoned.double().mean())
            entry["ap_of_poisoned"] = ranking.ap_of_poisoned(poisoned)
            entry["ap_of_clean"] = ranking.ap_of_clean(poisoned)
            entry["precision_of_poisoned"] = precision_by_recall(ranking.order.flip(0), poisoned)
            entry["precision_of_clean"] = precision_by_recall(ranking.order, ~poisoned)
        progress.append(entry)

    result = purify(
        prepared.model,
        prepared.train,
        clean_data=prepared.clean if with_clean else None,
        config=workshop.scale.pbe,
        seed=seed,
        on_round=look,
        **workshop.running(),
    )
    return {**_of_result(result, prepared, workshop), "progress": progress}


def _scan(prepared: Prepared, workshop: Workshop, *, seed: int) -> dict[str, Any]:
    """What a defender with the clean images finds."""
    found = scan(prepared.model, prepared.clean, config=workshop.scale.scan, seed=seed, **workshop.running())
    entry = found.to_dict()
    names = ("verdict", "target_label", "shift", "score", "p_value")
    return {"metrics": {name: entry.pop(name) for name in names}, "scan": entry}


def _of_result(result: PurifyResult, prepared: Prepared, workshop: Workshop) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metrics": _metrics(result.model, prepared, workshop),
        "history": result.history,
        "phases": result.seconds,
    }
    if result.ranking is not None and prepared.train.poison_mask is not None:
        found["metrics"] |= {
            "ap_of_poisoned": result.ranking.ap_of_poisoned(prepared.train.poison_mask.to(result.ranking.order.device))
        }
    return found


def _metrics(model: nn.Module, prepared: Prepared, workshop: Workshop) -> dict[str, Any]:
    return dict(runs.measure(model, prepared.test, prepared.triggered, device=workshop.device, progress=False))


def precision_by_recall(order: Tensor, positives: Tensor, points: int = RECALLS) -> list[float]:
    """The precision-recall curve of a ranking, at ``points`` recalls from 0 to 1 in equal steps.

    Args:
        order: (N,) int64, indices from the likeliest positive to the least likely.
        positives: (N,) bool, at least one.
        points: 2 or more.

    Returns:
        At each recall the precision of the shortest top of the ranking that has it; of recall 0, of the first positive.
    """
    hits = positives[order].double().cumsum(0)
    total = float(hits[-1])
    wanted = (torch.linspace(0, 1, points, dtype=torch.float64, device=order.device) * total).clamp_min(1)
    # A recall between two images is reached at the later one; the slack is for the rounding of 0.1 * 30.
    places = torch.searchsorted(hits, wanted - 1e-6)
    return [round(p, 5) for p in (hits[places] / (places + 1)).tolist()]
