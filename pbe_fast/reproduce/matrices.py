"""Fig. 1 and 4: which labels adversarial images reach, by target label, for benign and infected models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from pbe_fast.report.canvas import SHADES, SOFT, sheet, title, write_percent

Floats = npt.NDArray[np.float64]
# Up to so many labels, every cell has its number and every label its tick.
_NUMBERED = 12
_PANEL = 4.9


@dataclass(frozen=True, eq=False)
class Matrix:
    """One panel: row t holds the labels that images reach where label t is the target, as shares.

    Attributes:
        name: Of the panel.
        shares: (K, K); NaN in the rows of targets without a model.
        eps: Radius of the attack.
    """

    name: str
    shares: Floats
    eps: float

    @property
    def missing(self) -> list[int]:
        """Targets without a model."""
        return [int(t) for t in np.isnan(self.shares).all(1).nonzero()[0]]


def row_of_target(counts: Floats, target: int) -> Floats:
    """(K,) shares of the labels that misled images of other labels than ``target`` reach, of (K, K) counts."""
    misled = counts - np.diag(np.diag(counts))
    misled[target] = 0
    total = misled.sum()
    return np.asarray(misled.sum(0) / total if total else misled.sum(0))


def rows_of_shift(counts: Floats) -> Floats:
    """(K, K) shares for all-to-all: row t holds the misled images of label t - 1, whose target is t."""
    misled = counts - np.diag(np.diag(counts))
    return np.asarray(np.roll(misled / np.maximum(misled.sum(1, keepdims=True), 1), 1, axis=0))


def panel_matrix(name: str, setting: str, cells: Mapping[int, Mapping[str, Any]]) -> Matrix:
    """The matrix of a panel from the contents of its "reached" cells.

    Of the radii that were tried, the one at which the labels' distribution is most concentrated, whichever they are:
    the paper sets it for each attack, without saying how.

    Args:
        name: Of the panel.
        setting: "all_to_one", "all_to_all", or "benign" for one model, whose row for t leaves out the images of t.
        cells: By target label; a single one, whose key does not matter, but for all-to-one.
    """
    first = next(iter(cells.values()))
    best: tuple[float, Matrix] | None = None
    for level, eps in enumerate(entry["eps"] for entry in first["levels"]):
        counts = {t: np.array(cell["levels"][level]["counts"], dtype=np.float64) for t, cell in cells.items()}
        k = len(next(iter(counts.values())))
        if setting == "all_to_all":
            shares = rows_of_shift(next(iter(counts.values())))
        elif setting == "benign":
            shares = np.stack([row_of_target(next(iter(counts.values())), t) for t in range(k)])
        else:
            nothing = np.full(k, np.nan)
            shares = np.stack([row_of_target(counts[t], t) if t in counts else nothing for t in range(k)])
        concentration = float(np.nanmean(shares.max(1)))
        # A handful of misled images is concentrated by chance.
        misled = sum(float(c.sum() - np.trace(c)) / float(c.sum()) for c in counts.values()) / len(counts)
        if best is None or (misled >= 0.1 and concentration > best[0]):
            best = (concentration if misled >= 0.1 else -1.0, Matrix(name, shares, float(eps)))
    assert best is not None
    return best[1]


def draw_matrices(path: Path, matrices: Sequence[Matrix], note: str) -> None:
    """Write the panels side by side, at most three in a row.

    Args:
        path: Where to.
        matrices: At least one.
        note: A line under them.
    """
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    width, height = _PANEL * columns + 0.15, _PANEL * rows + 0.3
    with sheet(path, width, height) as figure:
        for i, matrix in enumerate(matrices):
            left = _PANEL * (i % columns) + 0.65
            bottom = height - _PANEL * (i // columns + 1) + 0.55
            side = _PANEL - 1.15
            _draw(figure.add_axes((left / width, bottom / height, side / width, side / height)), matrix)
        figure.text(0.15 / width, 0.1 / height, note, fontsize=8.5, color=SOFT, va="bottom")


def _draw(axes: Axes, matrix: Matrix) -> None:
    percent = np.ma.masked_invalid(100 * matrix.shares)
    k = len(percent)
    axes.imshow(percent, cmap=SHADES, vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    if k <= _NUMBERED:
        for y, x in zip(*np.nonzero(~np.ma.getmaskarray(percent)), strict=True):
            write_percent(axes, x, y, percent[y, x])
    step = 1 if k <= 20 else 5
    axes.set_xticks(range(0, k, step))
    axes.set_yticks(range(0, k, step))
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axes.set_xlabel("label that the adversarial images get", fontsize=9.5, color=SOFT)
    axes.set_ylabel("target label", fontsize=9.5, color=SOFT)
    there = k - len(matrix.missing)
    models = "" if there == k else f", targets with a model: {there} of {k}"
    title(axes, matrix.name, f"% of each row, eps {255 * matrix.eps:.3g}/255{models}")
    for spine in axes.spines.values():
        spine.set_visible(False)
