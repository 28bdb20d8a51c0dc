"""What all figures share: their colours, the sheet that they are drawn on, titles and axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pbe_fast.engine.files import atomic_write

# Okabe and Ito's blue and vermilion: told apart with every common kind of colour blindness, and in grey.
GOOD, BAD = "#0072B2", "#D55E00"
INK, SOFT, LINE = "#1f2328", "#6b7280", "#d0d7de"
# Of shares, 0 to 1.
SHADES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#9ecae1", GOOD, "#08306b"]).with_extremes(
    bad="#e5e7eb"
)
# From here on white is read more easily than ink.
_DARK = 0.58


@contextmanager
def sheet(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written to ``path`` as PNG when the block ends well."""
    # The user's own matplotlib settings would make another picture on every machine.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path) as temporary:
            # Neither a date nor a version in it: the same results give the same picture.
            figure.savefig(temporary, format="png", metadata={"Software": None})


def title(axes: Axes, text: str, note: str = "") -> None:
    """A title above the axes, and under it a line of explanation."""
    axes.set_title(text, fontsize=11, fontweight="bold", color=INK, loc="left", pad=21 if note else 7)
    if note:
        place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "va": "bottom", "ha": "left"}
        axes.annotate(note, (0, 1), xycoords="axes fraction", fontsize=9, color=SOFT, **place)


def plain_axes(axes: Axes) -> None:
    """Only the lines on the left and below, in grey."""
    axes.tick_params(colors=SOFT, labelsize=9, length=3, color=LINE)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)


def write_percent(axes: Axes, x: float, y: float, percent: float) -> None:
    """A number on its field of `SHADES`."""
    colour = "white" if percent > 100 * _DARK else INK
    axes.text(x, y, f"{percent:.0f}", ha="center", va="center", fontsize=8, color=colour)


def shorten(text: str, limit: int = 12) -> str:
    """``text`` with an ellipsis where it has more than ``limit`` characters."""
    return text if len(text) <= limit else text[: max(1, limit - 1)] + "…"
