"""The figure of a scan: where each label's adversarial images end up, and what stands out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pbe_fast.report.canvas import BAD, GOOD, INK, LINE, SHADES, SOFT, sheet, shorten, title, write_percent

# Up to so many labels have room for a name, up to so many for a number in every cell.
_NAMED, _NUMBERED = 20, 12


def draw_scan(
    path: str | os.PathLike[str],
    *,
    counts: Tensor,
    shares: Mapping[str, Tensor],
    critical: Mapping[str, float],
    verdict: str,
    summary: str,
    class_names: Sequence[str],
    best: Mapping[str, int] | None = None,
    by: str = "the attack",
) -> None:
    """Write the figure of a scan as a PNG, 1920 x 840 pixels.

    Args:
        path: Where to write; the file appears once it is whole.
        counts: (K, K) images by label and label reached, as `reached_labels` gives them.
        shares: "all_to_one": (K,) of the labels; "all_to_all": (K - 1,) of the shifts.
        critical: For both, the share from which on a backdoor is reported; may be infinite.
        verdict: "none", "all_to_one" or "all_to_all": whose largest share is drawn as found.
        summary: The finding, as a line above the figure.
        class_names: K names.
        best: Of both, which share is the finding; by default the largest.
        by: What leads the images to the labels reached.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    k = len(counts)
    with sheet(Path(path), 12.8, 5.6) as figure:
        colour = INK if verdict == "none" else BAD
        figure.text(0.02, 0.955, summary, fontsize=13, fontweight="bold", color=colour, va="top")
        labels = [shorten(name) for name in class_names]
        best = best or {setting: int(values.argmax()) for setting, values in shares.items()}
        found = {setting: best[setting] if setting == verdict else None for setting in shares}
        _draw_matrix(figure.add_axes((0.095, 0.15, 0.345, 0.65)), counts, labels, by)
        to_one = figure.add_axes((0.545, 0.15, 0.18, 0.65))
        _draw_shares(to_one, shares["all_to_one"], critical["all_to_one"], labels, found["all_to_one"])
        title(to_one, "All to one: % by label", "of images of other labels")
        to_all = figure.add_axes((0.8, 0.15, 0.18, 0.65))
        shifts = [f"y + {s}" for s in range(1, k)]
        _draw_shares(to_all, shares["all_to_all"], critical["all_to_all"], shifts, found["all_to_all"])
        title(to_all, "All to all: % by shift", "of images of every label")


def _draw_matrix(axes: Axes, counts: Tensor, labels: Sequence[str], by: str) -> None:
    """Each row as shares of its misled images; grey where an image cannot be led, on the diagonal."""
    k = len(counts)
    misled = (counts - torch.diag(counts.diagonal())).double()
    percent = (100 * misled / misled.sum(1, keepdim=True).clamp_min(1)).numpy()
    shown = np.ma.masked_array(percent, mask=np.eye(k, dtype=bool))
    axes.imshow(shown, cmap=SHADES, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    if k <= _NUMBERED:
        for y, x in zip(*np.nonzero(~shown.mask), strict=True):
            if counts[y, x]:
                write_percent(axes, x, y, percent[y, x])
    _ticks(axes.set_yticks, labels)
    # Slanted names end under their columns.
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    _ticks(axes.set_xticks, labels, **(slanted if max(map(len, labels)) > 2 else {}))
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0)
    axes.set_ylabel("label of the image", fontsize=9.5, color=SOFT)
    axes.set_xlabel(f"label that {by} leads to", fontsize=9.5, color=SOFT)
    title(axes, "Misled images, % of each row", "a dark column: all to one; a dark diagonal: all to all")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_shares(axes: Axes, shares: Tensor, critical: float, names: Sequence[str], found: int | None) -> None:
    values = 100 * shares.numpy()
    places = np.arange(len(values))
    axes.barh(places, values, height=0.72, color=[BAD if i == found else GOOD for i in places])
    even = 100 / (len(names) if names[0] == "y + 1" else len(names) - 1)
    right = max(float(values.max()), 100 * critical if critical <= 1 else 0.0, 2 * even) * 1.12
    axes.axvline(even, color=SOFT, linewidth=1, zorder=0)
    notes: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "color": SOFT, "va": "top"}
    axes.text(even, -0.08, "even", ha="center", **notes)
    # On a line of its own: the two may be near each other.
    if critical <= 1:
        axes.axvline(100 * critical, color=BAD, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(100 * critical, -0.125, "reported", ha="center", **{**notes, "color": BAD})
    else:
        axes.text(right, -0.125, "no share is reported", ha="right", **notes)
    _ticks(axes.set_yticks, names)
    axes.set(xlim=(0, right), ylim=(len(values) - 0.5, -0.5))
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(LINE)


def _ticks(set_ticks: Any, names: Sequence[str], **text: Any) -> None:
    """All names where there is room, else every fifth label's number."""
    if len(names) <= _NAMED:
        set_ticks(range(len(names)), names, **text)
    else:
        shifts = names[0] == "y + 1"
        places = range(4, len(names), 5) if shifts else range(0, len(names), 5)
        set_ticks(places, [names[i] if shifts else str(i) for i in places])
