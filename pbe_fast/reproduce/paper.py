"""The paper's own figures, as its tables have them."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

METRICS = ("acc", "asr")


def paper_value(table: int, attack: str, defense: str, metric: str) -> float | None:
    """A figure of Tables 1 to 4 in percent; None where the paper has none.

    Args:
        table: 1 to 4.
        attack: A row: "badnets", "blend", "sig", "input_aware" or "wanet".
        defense: A column: "before", "ft", "fp", "nad", "nc", "anp", "pbe_no_clean" or "pbe".
        metric: "acc" or "asr".
    """
    row = _figures()["tables"].get(str(table), {}).get(attack)
    return None if row is None else float(row[defense][METRICS.index(metric)])


def paper_distance(attack: str, model: str) -> float | None:
    """A figure of Table 5: D of ``model``, "benign" or "infected"; None where the paper's text does not have it."""
    value = _figures()["tables"]["5"].get(attack, {}).get(model)
    return None if value is None else float(value)


def paper_ap() -> tuple[float, float]:
    """The average precision of Fig. 6 in the first and in the last round."""
    figure = _figures()["figure_6"]
    return figure["ap_first"], figure["ap_last"]


@cache
def _figures() -> dict[str, Any]:
    text = resources.files("pbe_fast.reproduce").joinpath("paper.json").read_text(encoding="utf-8")
    figures: dict[str, Any] = json.loads(text)
    return figures
