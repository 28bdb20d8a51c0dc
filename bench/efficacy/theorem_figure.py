"""The figure of theorem.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from pbe_fast.report.canvas import BAD, GOOD, INK, LINE, SOFT, plain_axes, sheet

if TYPE_CHECKING:
    from theorem import Row


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Measured projections: by norm of the trigger with the bound that is proved, and against the paper's bound."""
    with sheet(path, 12.8, 5.2) as figure:
        figure.set_layout_engine("constrained")
        left, right = figure.subplots(1, 2)
        _draw_norms(left, rows)
        _draw_paper(right, rows)
        for axes in (left, right):
            plain_axes(axes)
            axes.tick_params(which="minor", color=LINE)


def _draw_norms(axes: Axes, rows: Sequence[Row]) -> None:
    regularisations = sorted({row.regularisation for row in rows})
    middle = regularisations[len(regularisations) // 2]
    counts = sorted({row.poisoned for row in rows})
    norms = sorted({row.trigger_norm for row in rows})
    # Every other count: neighbours' lines would lie on each other.
    for count in counts[::2]:
        for name, style, colour in (("measured", "-", GOOD), ("bound_infected", "--", SOFT)):
            means = [
                statistics.fmean(
                    getattr(row, name)
                    for row in rows
                    if (row.poisoned, row.regularisation, row.trigger_norm) == (count, middle, norm)
                )
                for norm in norms
            ]
            axes.plot(norms, means, style, color=colour, marker="o", markersize=3, linewidth=1.3)
            if name == "measured":
                axes.annotate(f" {count} poisoned", (norms[-1], means[-1]), fontsize=9, color=INK, va="center")
    axes.set(xscale="log", yscale="log", xlim=(norms[0] / 1.1, norms[-1] * 1.9))
    axes.set_xticks(norms, [f"{norm:g}" for norm in norms], minor=False)
    axes.set_xticks([], minor=True)
    title = f"Projection of r on the trigger: measured, and proved (dashed); λ = {middle:g}"
    axes.set_title(title, fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel("norm of the trigger (images have norm 1)", fontsize=9, color=SOFT)


def _draw_paper(axes: Axes, rows: Sequence[Row]) -> None:
    for assumed in (True, False):
        for below, colour in ((False, GOOD), (True, BAD)):
            some = [row for row in rows if row.assumption_10 == assumed and (row.measured < row.bound_paper) == below]
            axes.plot(
                [row.bound_paper for row in some],
                [row.measured for row in some],
                "o",
                color=colour,
                fillstyle="full" if assumed else "none",
                markersize=5,
                linestyle="none",
                label=f"Eq. 10 {'holds' if assumed else 'fails'}, bound {'broken' if below else 'met'}: {len(some)}",
            )
    ends = [min(row.bound_paper for row in rows), max(row.bound_paper for row in rows)]
    axes.plot(ends, ends, color=INK, linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.set_title("Theorem 1 as printed (with l as a fraction of n)", fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel("the paper's lower bound", fontsize=9, color=SOFT)
    axes.set_ylabel("measured projection", fontsize=9, color=SOFT)
    axes.legend(fontsize=9, frameon=False)
