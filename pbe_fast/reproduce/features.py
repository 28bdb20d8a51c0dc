"""Fig. 3 and 5: feature maps, and the features in two dimensions."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from pbe_fast.report.canvas import INK, LINE, SOFT, sheet, title

KINDS = {
    "clean": "clean image x",
    "benign": "adversarial, benign model x̃",
    "infected": "adversarial, infected model x̃′",
    "triggered": "triggered image xᵗ",
}
_MAP_SHADES = "magma"


def draw_maps(path: Path, maps: Sequence[Mapping[str, Any]], note: str) -> None:
    """Fig. 3: pictures and, under each, the infected model's feature maps of it, stage by stage.

    Args:
        path: Where to.
        maps: Of a "features" cell, one entry per image.
        note: A line under them.
    """
    stages = list(maps[0]["stages"])
    rows, columns = 1 + len(stages), len(KINDS)
    with sheet(path, 1.55 * columns * len(maps) + 1.2, 1.62 * rows + 0.95) as figure:
        figure.set_layout_engine("constrained", rect=(0.005, 0.05, 0.99, 0.93), w_pad=0.03, h_pad=0.03)
        grid = figure.subplots(rows, columns * len(maps), squeeze=False)
        for i, entry in enumerate(maps):
            for j, (kind, name) in enumerate(KINDS.items()):
                column = grid[:, i * columns + j]
                column[0].imshow(decode_png(entry["pictures"][kind]), cmap="gray", vmin=0, vmax=255)
                column[0].set_title(name.replace(" model", "\nmodel").replace(" image", "\nimage"), fontsize=8.5)
                for axes, stage in zip(column[1:], stages, strict=True):
                    shown = entry["stages"][stage]
                    # One scale for the four that are to be compared.
                    high = max(float(np.max(shown[other])) for other in KINDS)
                    axes.imshow(np.array(shown[kind]), cmap=_MAP_SHADES, vmin=0, vmax=high or 1.0)
                    if kind in ("clean", "benign", "infected"):
                        _note_distance(axes, np.array(shown[kind]), np.array(shown["triggered"]))
        for row, name in enumerate(["pixels", *stages]):
            grid[row, 0].set_ylabel(name.removeprefix("net."), fontsize=9.5, color=INK)
        for axes in grid.flatten():
            _frame(axes)
        figure.text(0.012, 0.012, note, fontsize=8.5, color=SOFT, va="bottom")


def draw_tsne(path: Path, points: Sequence[Sequence[Any]], target: int, classes: int, note: str) -> None:
    """Fig. 5: clean images dark, their adversarial images light, triggered ones black; the target's class in cyan.

    Args:
        path: Where to.
        points: Of a "tsne" cell: kind, label, x, y.
        target: The target label.
        classes: Number of them.
        note: A line under it.
    """
    with sheet(path, 8.4, 7.0) as figure:
        axes = figure.add_axes((0.02, 0.065, 0.96, 0.845))
        for kind, size, share in (("infected", 13.0, 0.45), ("clean", 15.0, 1.0)):
            some = [(label, x, y) for found, label, x, y in points if found == kind]
            colours = [_mixed(_colour(label, target, classes), share) for label, _, _ in some]
            axes.scatter([x for _, x, _ in some], [y for _, _, y in some], s=size, c=colours, linewidths=0)
        black = [(x, y) for found, _, x, y in points if found == "triggered"]
        axes.scatter([x for x, _ in black], [y for _, y in black], s=20, c="black", marker="x", linewidths=0.9)
        for label in range(classes):
            mine = np.array([(x, y) for found, own, x, y in points if found == "clean" and own == label])
            if len(mine) and classes <= 20:
                at = np.median(mine, axis=0)
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.15"}
                place: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 12,
                    "fontweight": "bold",
                    "color": INK,
                }
                axes.text(float(at[0]), float(at[1]), str(label), bbox=box, **place)
        _frame(axes)
        title(
            axes,
            "Features of the infected model (t-SNE)",
            f"dark: clean, by class · light: adversarial, by the class of the image · ×: triggered, target {target}",
        )
        figure.text(0.012, 0.012, note, fontsize=8.5, color=SOFT, va="bottom")


def decode_png(text: str) -> Any:
    """The pixels of a picture that `encode_png` made."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def _note_distance(axes: Axes, one: Any, other: Any) -> None:
    apart = float(np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-12))
    axes.set_xlabel(f"{100 * apart:.0f} % from xᵗ", fontsize=8, color=SOFT, labelpad=2)


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)


def _colour(label: int, target: int, classes: int) -> tuple[float, float, float]:
    """Cyan for the target, other hues for the others."""
    if label == target:
        return 0.0, 0.72, 0.80
    others = [k for k in range(classes) if k != target]
    # The circle of hues without the neighbourhood of cyan.
    hue = (0.60 + 0.80 * others.index(label) / max(1, len(others))) % 1.0
    return colorsys.hls_to_rgb(hue, 0.36 + 0.14 * (label % 2), 0.75)


def _mixed(colour: tuple[float, float, float], share: float) -> tuple[float, ...]:
    """The colour with white."""
    return tuple(1 - share * (1 - c) for c in colour)
