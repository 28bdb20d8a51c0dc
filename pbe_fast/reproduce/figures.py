"""From finished cells to the figures of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pbe_fast.reproduce.cells import (
    MATRICES,
    SINGLE,
    SINGLE_TASKS,
    Cell,
    Panel,
    Request,
    Subject,
    matrix_subjects,
    subject_of,
)
from pbe_fast.reproduce.curves import draw_rankings, draw_rounds
from pbe_fast.reproduce.features import draw_maps, draw_tsne
from pbe_fast.reproduce.matrices import Matrix, draw_matrices, panel_matrix
from pbe_fast.reproduce.paper import paper_ap
from pbe_fast.reproduce.scales import Scale
from pbe_fast.reproduce.store import Store
from pbe_fast.reproduce.tables import ATTACK_NAMES

_SETTINGS = {"all_to_one": "all-to-one", "all_to_all": "all-to-all"}


def draw_figure(number: int, folder: Path, request: Request, scale: Scale, store: Store) -> Path | None:
    """Write ``figure-N.png`` from the cells that are finished; None where there is nothing to draw yet."""
    path = folder / f"figure-{number}.png"
    made = (
        _draw_matrices(number, path, request, scale, store)
        if number in MATRICES
        else _draw_single(number, path, request, scale, store)
    )
    return path if made else None


def _draw_matrices(number: int, path: Path, request: Request, scale: Scale, store: Store) -> bool:
    matrices: dict[str, Matrix] = {}
    for panel in MATRICES[number]:
        if not request.wants(panel.attack):
            continue
        subjects = matrix_subjects(panel, request, scale, request.seeds[0])
        benign = store.read(Cell(subjects[0].benign(), "reached"))
        data = subjects[0].data
        if benign is not None:
            matrices[data] = panel_matrix(f"{data}: benign model", "benign", {0: benign})
        found = {s.target: entry for s in subjects if (entry := store.read(Cell(s, "reached"))) is not None}
        if found:
            name = f"{data}: {ATTACK_NAMES[panel.attack]}, {_SETTINGS[panel.setting]}"
            matrices[name] = panel_matrix(name, panel.setting, found)
    if matrices:
        note = "Images of the target itself are left out, and those that withstood. " + _note(scale)
        draw_matrices(path, list(matrices.values()), note)
    return bool(matrices)


def _draw_single(number: int, path: Path, request: Request, scale: Scale, store: Store) -> bool:
    panel: Panel = dataclasses.replace(SINGLE, attack=request.attacks[0] if request.attacks else SINGLE.attack)
    subjects = [subject_of(panel, scale, seed) for seed in request.seeds]
    found: dict[Subject, dict[str, Any]] = {
        s: entry for s in subjects if (entry := store.read(Cell(s, SINGLE_TASKS[number][0]))) is not None
    }
    if not found:
        return False
    subject, entry = next(iter(found.items()))
    where = f"{subject.data}, {ATTACK_NAMES[panel.attack]}, {_SETTINGS[panel.setting]}"
    note = f"{where}, seed {subject.seed}. {_note(scale)}"
    draw: dict[int, Callable[[], None]] = {
        3: lambda: draw_maps(
            path, entry["maps"], f"Mean |activation| over channels; distances relative to the triggered one's. {note}"
        ),
        5: lambda: draw_tsne(path, entry["points"], subject.target, entry["data"]["classes"], note),
        6: lambda: draw_rankings(
            path, entry["progress"], f"{note} The paper's AP: {paper_ap()[0]:.2f} to {paper_ap()[1]:.2f}."
        ),
        7: lambda: draw_rounds(
            path, list(found.values()), [_before(store, s) for s in found], f"{where}. {_note(scale)}"
        ),
    }
    draw[number]()
    return True


def _before(store: Store, subject: Subject) -> dict[str, float] | None:
    entry = store.read(Cell(subject, "before"))
    return None if entry is None else dict(entry["metrics"])


def _note(scale: Scale) -> str:
    return f"Scale {scale.name}" + (": no reproduction, digits stand in." if scale.stand_in else ".")
