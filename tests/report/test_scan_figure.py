from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image as image_files
from matplotlib.figure import Figure
from pixels import share

from pbe_fast.attraction import arrival_shares, shift_shares
from pbe_fast.report.scan_figure import _draw_shares, draw_scan


def _draw(path: Path, counts: torch.Tensor, verdict: str = "none", critical: float = 0.4) -> np.ndarray:
    draw_scan(
        path,
        counts=counts,
        shares={"all_to_one": arrival_shares(counts), "all_to_all": shift_shares(counts)},
        critical={"all_to_one": critical, "all_to_all": critical},
        verdict=verdict,
        summary="what was found",
        class_names=[f"a class with number {i}" for i in range(len(counts))],
    )
    return image_files.imread(path)


@pytest.mark.parametrize("k", [3, 10, 43])
def test_what_is_found_stands_out(k: int, tmp_path: Path) -> None:
    counts = torch.ones(k, k, dtype=torch.int64)
    counts[:, 1] += 9 * k
    quiet, loud = _draw(tmp_path / "a.png", counts), _draw(tmp_path / "b.png", counts, "all_to_one")
    assert quiet.shape[:2] == loud.shape[:2] == (840, 1920)
    assert share(loud, "#D55E00") > share(quiet, "#D55E00") + 0.001


def test_a_share_that_cannot_be_reached_is_not_drawn(tmp_path: Path) -> None:
    counts = torch.ones(5, 5, dtype=torch.int64)
    assert share(_draw(tmp_path / "a.png", counts, critical=math.inf), "#D55E00") == 0
    assert share(_draw(tmp_path / "b.png", counts), "#D55E00") > 0


def test_no_image_was_misled(tmp_path: Path) -> None:
    assert _draw(tmp_path / "a.png", torch.diag(torch.tensor([3, 3, 3]))).shape[:2] == (840, 1920)


@pytest.mark.parametrize("critical", [0.12, 0.2, math.inf])
def test_what_stands_under_the_shares_does_not_overlap(critical: float) -> None:
    figure = Figure(figsize=(12.8, 5.6))
    axes = figure.add_axes((0.8, 0.15, 0.18, 0.65))
    _draw_shares(axes, torch.full((9,), 1 / 9), critical, [f"y + {s}" for s in range(1, 10)], None)
    figure.draw_without_rendering()
    even, reported = (text.get_window_extent() for text in axes.texts)
    assert not even.overlaps(reported) and reported.y0 > 0
    assert not any(even.overlaps(tick.get_window_extent()) for tick in axes.get_xticklabels())
