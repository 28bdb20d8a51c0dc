"""One figure for a run: did the backdoor go, how were the images ranked, which ones are suspected."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from pbe_fast.errors import InputError
from pbe_fast.metrics import average_precision
from pbe_fast.report.canvas import BAD, GOOD, INK, SOFT, plain_axes, sheet, shorten
from pbe_fast.report.tables import Models, model_name, percent

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

MAX_IMAGES = 8
ROW_NAMES = {"clean": "clean", "triggered": "with trigger", "suspected": "most suspected"}


def draw_figure(
    path: str | os.PathLike[str],
    *,
    models: Models,
    scores: Tensor,
    poison_mask: Tensor | None,
    images: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the figure of a run as a PNG, 1920 x 640 pixels.

    Args:
        path: Where to write; the file appears once it is whole.
        models: Metrics by model, as for `metrics_table`.
        scores: (N,) scores of the training images by Eq. 9: 1 where the purified model gives the logits of the
            infected one, lower where they changed.
        poison_mask: (N,) bool, True where the image is poisoned; None where the truth is not known.
        images: Rows of pictures: (n, C, H, W), float in [0, 1] or uint8, under the names "clean", "triggered",
            "suspected" or any other. The first eight of each are shown.
        captions: For some of the rows, one short text per image, such as its label.

    Raises:
        InputError: No models, no finite score, or a mask or captions of another length.
        OutputError: ``path`` cannot be written.
    """
    captions = captions or {}
    values, poisoned = _check(models, scores, poison_mask, images, captions)
    rows = {name: row[:MAX_IMAGES] for name, row in images.items() if len(row)}
    with sheet(Path(path), 12.8, 4.27) as figure:
        widths = [1.05, 0.95, 1.3] if rows else [1.05, 0.95]
        left, middle, *right = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths, wspace=0)[0]
        _draw_bars(left, models)
        _draw_scores(middle, values, poisoned)
        if rows:
            _draw_strips(right[0], rows, captions)


def _draw_bars(panel: SubFigure, models: Models) -> None:
    """ACC and ASR of each model, its name above its bars."""
    axes = panel.add_axes((0.07, 0.05, 0.89, 0.77))
    _title(axes, "Accuracy and attack success, %", [("ACC of clean images", GOOD), ("ASR of triggered ones", BAD)])
    for i, (key, metrics) in enumerate(models.items()):
        axes.text(0, i - 0.34, model_name(key, models), va="bottom", fontsize=10.5, color=INK)
        for name, colour, y in (("acc", GOOD, i - 0.18), ("asr", BAD, i + 0.11)):
            fraction = metrics.get(name)
            if fraction is not None and math.isfinite(fraction):
                axes.barh(y, 100 * fraction, height=0.25, color=colour)
                axes.text(100 * fraction + 1.5, y, percent(fraction), va="center", fontsize=10, color=colour)
    # One model alone would get bars as thick as a thumb.
    axes.set(xlim=(0, 114), ylim=(max(len(models), 2) - 0.6, -0.6))
    axes.set_axis_off()
    axes.title.set_visible(True)


def _draw_scores(panel: SubFigure, scores: Floats, poisoned: Bools | None) -> None:
    """Scores of clean and of poisoned images, each as shares of its own group."""
    axes = panel.add_axes((0.13, 0.2, 0.81, 0.62))
    if poisoned is None:
        groups = [("training images", SOFT, scores)]
        notes = [(f"{len(scores):,} training images", SOFT)]
    else:
        groups = [("clean", GOOD, scores[~poisoned]), ("poisoned", BAD, scores[poisoned])]
        notes = [("clean", GOOD), ("poisoned", BAD)]
        if poisoned.any():
            order = torch.from_numpy(np.argsort(scores, kind="stable"))
            ap = average_precision(order, torch.from_numpy(poisoned))
            notes.append((f"AP {ap:.2f}, by chance {poisoned.mean():.2f}", INK))
    low, high = float(scores.min()), float(scores.max())
    bins = np.linspace(low, high if high > low else low + 1e-3, 41)
    for _, colour, group in groups:
        if len(group):
            shares = np.histogram(group, bins)[0] / len(group)
            axes.stairs(100 * shares, bins, fill=True, color=colour, alpha=0.4)
            axes.stairs(100 * shares, bins, color=colour, linewidth=1.4)
    _title(axes, "Training images by score (Eq. 9)", notes)
    axes.set_ylabel("share of the group, %", fontsize=9, color=SOFT)
    axes.set(xlim=(bins[0], bins[-1]), ylim=(0, None))
    axes.locator_params(nbins=5)
    plain_axes(axes)
    below: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 9, "va": "top", "color": SOFT}
    axes.text(0, -0.13, "← logits changed: suspected", ha="left", **below)
    axes.text(1, -0.13, "unchanged →", ha="right", **below)


def _draw_strips(panel: SubFigure, rows: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]]) -> None:
    """Rows of pictures, each under its name and with its captions below it."""
    width, height = panel.bbox.width, panel.bbox.height
    columns = max(len(row) for row in rows.values())
    heading, caption, gap, top, left = 0.055, 0.055, 0.02, 0.865, 0.03
    panel.text(left, 0.937, "Images and their labels", fontsize=11.5, fontweight="bold", color=INK, va="top")
    pitch = (top - 0.01) / len(rows)
    # Square cells that fit both ways, in fractions of the panel's width.
    cell = min((0.98 - left) / columns, (pitch - heading - caption - gap) * height / width)
    for i, (name, row) in enumerate(rows.items()):
        y = top - i * pitch
        panel.text(left, y, ROW_NAMES.get(name, name), fontsize=10.5, color=INK, va="top")
        for j, image in enumerate(row):
            side = cell * width / height
            axes = panel.add_axes((left + j * cell, y - heading - side, cell * 0.93, side * 0.93))
            _draw_image(axes, image)
            if name in captions:
                text = shorten(captions[name][j], int(cell * width / panel.figure.dpi * 72 / 5))
                colour = BAD if name == "suspected" else SOFT
                axes.annotate(
                    text, (0, 0), (0, -3), "axes fraction", "offset points", fontsize=7.5, va="top", color=colour
                )


def _draw_image(axes: Axes, image: Tensor) -> None:
    scale = 255 if image.dtype == torch.uint8 else 1
    pixels = (image.detach().cpu().float() / scale).clamp(0, 1).permute(1, 2, 0)
    # Small pictures keep their pixels, as the model sees them; large ones are shrunk smoothly.
    smooth = max(image.shape[1:]) > 64
    shown = pixels.squeeze(2).numpy()
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="antialiased" if smooth else "nearest")
    axes.set_axis_off()


def _title(axes: Axes, title: str, notes: Sequence[tuple[str, str]]) -> None:
    """A title, and under it the groups of the panel in their own colours: no legend to look up."""
    axes.set_title(title, fontsize=11.5, fontweight="bold", color=INK, loc="left", pad=26)
    before: Any = None
    for text, colour in notes:
        place = (
            {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 9)}
            if before is None
            else {"xy": (1, 0), "xycoords": before, "xytext": (12, 0)}
        )
        before = axes.annotate(text, textcoords="offset points", va="bottom", fontsize=10, color=colour, **place)


def _check(
    models: Models,
    scores: Tensor,
    poison_mask: Tensor | None,
    images: Mapping[str, Tensor],
    captions: Mapping[str, Sequence[str]],
) -> tuple[Floats, Bools | None]:
    """The scores that are finite, and which of them are poisoned."""
    if not models:
        raise InputError("models of a figure", got="none", accepted="at least one, with its metrics")
    if scores.ndim != 1 or (poison_mask is not None and poison_mask.shape != scores.shape):
        got = f"{tuple(scores.shape)} and {None if poison_mask is None else tuple(poison_mask.shape)}"
        raise InputError("shapes of scores and poison_mask", got=got, accepted="(N,) both")
    for name, row in images.items():
        if row.ndim != 4 or row.shape[1] not in (1, 3):
            raise InputError(
                f"pictures '{name}'", got=f"shape {tuple(row.shape)}", accepted="(n, C, H, W), C of 1 or 3"
            )
        if name in captions and len(captions[name]) < len(row[:MAX_IMAGES]):
            raise InputError(
                f"captions of '{name}'", got=len(captions[name]), accepted=f"one for each of {len(row)} images"
            )
    values = scores.detach().cpu().double().numpy()
    finite = np.isfinite(values)
    if not finite.any():
        raise InputError("scores", got="none that is finite", accepted="at least one")
    return values[finite], None if poison_mask is None else poison_mask.cpu().numpy().astype(bool)[finite]
