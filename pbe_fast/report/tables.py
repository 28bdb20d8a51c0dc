"""Metrics as a small table that reads well in a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pbe_fast.baselines import METHOD_NAMES

MISSING = "–"

# The columns of every table of models, in the order of the keys of `report.json`.
COLUMNS = {
    "acc": "ACC %",
    "asr": "ASR %",
    "asr_with_target": "ASR with target %",
    "recovered_acc": "recovered ACC %",
}

Models = Mapping[str, Mapping[str, float | None]]


def metrics_table(models: Models) -> str:
    """One line per model, in percent.

    Args:
        models: By the name it has in a report ("infected", "fine_tuned", "purified", "purified_no_clean", or any
            other), its ``acc``, ``asr``, ``asr_with_target`` and ``recovered_acc`` as fractions; None or absent where
            no trigger is known.

    Returns:
        An aligned Markdown table without a final newline; columns that hold no figure at all are left out.
    """
    columns = [key for key in COLUMNS if key == "acc" or any(values.get(key) is not None for values in models.values())]
    rows = [
        [model_name(name, models), *(percent(values.get(key)) for key in columns)] for name, values in models.items()
    ]
    return table(["model", *(COLUMNS[key] for key in columns)], rows)


def named_models(models: Models, method: str) -> Models:
    """``models`` with "purified" under the name of the method that made it, where that is not PBE."""
    if method == "pbe":
        return models
    return {METHOD_NAMES.get(method, method) if key == "purified" else key: value for key, value in models.items()}


def model_name(key: str, models: Models) -> str:
    """What a report's key for a model is called in tables and figures."""
    both = "purified_no_clean" in models
    names = {
        "infected": "infected",
        "fine_tuned": "plain fine-tuning",
        "purified": "PBE, clean set" if both else "PBE",
        "purified_no_clean": "PBE, no clean set",
    }
    return names.get(key, key.replace("_", " "))


def percent(fraction: float | None) -> str:
    """A fraction in [0, 1] in percent with one decimal; a dash for None and NaN."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column to the left, figures to the right."""
    cells = [[_escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _escape(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())
