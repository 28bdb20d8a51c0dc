"""What all figures share."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pbe_fast.report.canvas import SHADES, shorten, write_percent


def luminance(colour: tuple[float, ...]) -> float:
    """As WCAG 2 has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("percent", range(0, 101, 5))
def test_a_number_is_legible_on_its_shade(percent: int) -> None:
    axes = Figure().subplots()
    write_percent(axes, 0, 0, percent)
    (text,) = axes.texts
    dark, light = sorted([luminance(to_rgb(text.get_color())), luminance(SHADES(percent / 100))])
    assert text.get_text() == str(percent)
    assert (light + 0.05) / (dark + 0.05) > 3.9


def test_long_names_end_in_an_ellipsis() -> None:
    assert [shorten(name) for name in ("automobile", "a twelve-let", "thirteen-long")] == [
        "automobile",
        "a twelve-let",
        "thirteen-lo…",
    ]
    assert shorten("cat", 0) == "c…"
