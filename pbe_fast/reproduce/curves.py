"""Fig. 6 and 7: how the ranking and the model get better by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from pbe_fast.report.canvas import BAD, GOOD, INK, LINE, SHADES, SOFT, plain_axes, sheet, title


def draw_rankings(path: Path, progress: Sequence[Mapping[str, Any]], note: str) -> None:
    """Fig. 6: precision-recall curves of the ranking by round, of poisoned and of clean images.

    Args:
        path: Where to.
        progress: Of a "pbe_no_clean" cell, one entry per round.
        note: A line under them.
    """
    with sheet(path, 10.6, 5.0) as figure:
        for left, positives in ((0.065, "poisoned"), (0.565, "clean")):
            poisoned = float(progress[0]["poisoned_share"])
            share = poisoned if positives == "poisoned" else 1 - poisoned
            axes = figure.add_axes((left, 0.175, 0.415, 0.66))
            for i, entry in enumerate(progress):
                curve = entry[f"precision_of_{positives}"]
                # From light to dark as the rounds go on.
                colour = SHADES(0.3 + 0.6 * i / max(1, len(progress) - 1))
                ap = f"{entry[f'ap_of_{positives}']:.2f}"
                recall = np.linspace(0, 1, len(curve))
                axes.plot(recall, curve, color=colour, linewidth=1.8, label=f"round {entry['round'] + 1}: AP {ap}")
            axes.axhline(share, color=LINE, linewidth=1, zorder=0)
            axes.text(0.012, share - 0.015, "chance", fontsize=8.5, color=SOFT, va="top")
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            plain_axes(axes)
            axes.set_xlabel("recall", fontsize=9.5, color=SOFT)
            axes.set_ylabel("precision", fontsize=9.5, color=SOFT)
            where = "from the end" if positives == "poisoned" else "from the top"
            title(axes, f"Finding {positives} images", f"the ranking read {where}")
            # Over the curves where there is no room beside them.
            box: dict[str, Any] = {"fontsize": 9, "framealpha": 0.9, "edgecolor": "white", "labelcolor": INK}
            axes.legend(loc="best" if positives == "poisoned" else "lower left", **box)
        figure.text(0.02, 0.015, note, fontsize=8.5, color=SOFT, va="bottom")


def draw_rounds(
    path: Path, runs: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, float] | None], note: str
) -> None:
    """Fig. 7: ACC and ASR by round; the mean over the runs, and each of them as a thin line.

    Args:
        path: Where to.
        runs: "pbe_no_clean" cells, one per seed.
        before: Metrics of the infected models, as far as they are known: round 0.
        note: A line under them.
    """
    rounds = range(1, 1 + min(len(run["progress"]) for run in runs))
    known = [metrics for metrics in before if metrics is not None]
    with sheet(path, 7.6, 4.9) as figure:
        axes = figure.add_axes((0.09, 0.17, 0.79, 0.69))
        means: dict[str, list[float]] = {}
        for metric, colour, name in (("acc", GOOD, "ACC"), ("asr", BAD, "ASR")):
            lines = np.array([[100 * run["progress"][t - 1][metric] for t in rounds] for run in runs])
            places = list(rounds)
            if len(known) == len(runs):
                lines = np.column_stack([[100 * float(metrics[metric]) for metrics in known], lines])
                places = [0, *places]
            if len(lines) > 1:
                for line in lines:
                    axes.plot(places, line, color=colour, linewidth=0.8, alpha=0.4)
            mean = lines.mean(0)
            axes.plot(places, mean, color=colour, linewidth=2, marker="o", markersize=5)
            means[colour] = mean.tolist()
            axes.annotate(
                name, (places[-1], mean[-1]), (9, 0), "data", "offset points", color=colour, fontsize=11, va="center",
                fontweight="bold",
            )  # fmt: skip
        _label_points(axes, places, means)
        axes.set_xticks(places, ["infected" if t == 0 else f"round {t}" for t in places])
        axes.set(ylim=(-4, 112), xlim=(places[0] - 0.15, places[-1] + 0.15))
        plain_axes(axes)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("%", fontsize=9.5, color=SOFT)
        seeds = f"mean of {len(runs)} seeds, each as a thin line" if len(runs) > 1 else "one seed"
        title(axes, "The model by round, no clean set", seeds)
        figure.text(0.02, 0.015, note, fontsize=8.5, color=SOFT, va="bottom")


def _label_points(axes: Axes, places: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
    """The values, each on the side of its point where the other line is not, and beside a line that falls steeply."""
    for colour, values in lines.items():
        for i, (x, y) in enumerate(zip(places, values, strict=True)):
            below = any(0 < other[i] - y < 15 for other in lines.values())
            up, align = (-8, "top") if below else (7, "bottom")
            falls = i > 0 and values[i - 1] - y > 15 and not below
            axes.annotate(
                f"{y:.1f}", (x, y), (2 if falls else 0, up), "data", "offset points", fontsize=8.5, color=colour,
                ha="left" if falls else "center", va=align, path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
