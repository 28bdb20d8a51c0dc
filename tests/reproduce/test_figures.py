"""Figures are written, are not blank, and show what the cells say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pbe_fast.reproduce import Cell, Request, Scale, Store
from pbe_fast.reproduce.cells import Panel, subject_of
from pbe_fast.reproduce.evidence import encode_png
from pbe_fast.reproduce.features import KINDS, decode_png
from pbe_fast.reproduce.figures import draw_figure
from pbe_fast.reproduce.matrices import draw_matrices, panel_matrix

BLEND = Panel("cifar10", "blend", "all_to_one")


def not_blank(path: Path | None) -> bool:
    assert path is not None
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    return bool(picture.format == "PNG" and (pixels < 200).mean() > 0.002)


def counts(k: int = 10, target: int | None = None, shift: int = 0, eps: float = 0.1) -> dict[str, Any]:
    table = np.full((k, k), 2)
    if target is not None:
        table[:, target] += 50
    if shift:
        table[np.arange(k), (np.arange(k) + shift) % k] += 50
    return {"levels": [{"eps": eps, "counts": table.tolist()}]}


def progress() -> list[dict[str, Any]]:
    rising = np.linspace(1, 0.2, 101).tolist()
    return [
        {
            "round": t,
            "acc": 0.8 + 0.02 * t,
            "asr": 0.3 / (t + 1),
            "poisoned_share": 0.1,
            **{f"ap_of_{kind}": 0.5 + 0.1 * t for kind in ("poisoned", "clean")},
            **{f"precision_of_{kind}": rising for kind in ("poisoned", "clean")},
        }
        for t in range(3)
    ]


def maps() -> list[dict[str, Any]]:
    picture = encode_png(torch.full((1, 16, 16), 128, dtype=torch.uint8))
    stage = {kind: np.eye(4).tolist() for kind in KINDS}
    return [{"label": 1, "pictures": dict.fromkeys(KINDS, picture), "stages": {"conv2": stage}}] * 2


EXTRA: dict[str, dict[str, Any]] = {
    "features": {"maps": maps()},
    "tsne": {"points": [[kind, k, float(k), float(i)] for i, kind in enumerate(KINDS) for k in range(10)]},
    "pbe_no_clean": {"progress": progress()},
}


@pytest.mark.parametrize(("number", "task"), [(3, "features"), (5, "tsne"), (6, "pbe_no_clean"), (7, "pbe_no_clean")])
def test_figures_of_one_model(number: int, task: str, tiny: Scale, tmp_path: Path, made_up: Callable) -> None:
    request, store = Request(figures=(number,), seeds=(0, 1)), Store(tmp_path)
    assert draw_figure(number, tmp_path, request, tiny, store) is None
    assert not list(tmp_path.glob("*.png"))
    for seed in (0, 1):
        cell = Cell(subject_of(BLEND, tiny, seed), task)
        store.write(cell, {**made_up(cell, tiny, acc=0.9, asr=0.1), **EXTRA[task]})
    assert not_blank(draw_figure(number, tmp_path, request, tiny, store))
    without_infected = (tmp_path / f"figure-{number}.png").read_bytes()
    for seed in (0, 1):
        cell = Cell(subject_of(BLEND, tiny, seed), "before")
        store.write(cell, made_up(cell, tiny, acc=0.95, asr=1.0))
    draw_figure(number, tmp_path, request, tiny, store)
    # Only Fig. 7 begins with the infected model; all others come out the same, byte by byte.
    assert ((tmp_path / f"figure-{number}.png").read_bytes() == without_infected) == (number != 7)


@pytest.mark.parametrize("number", [1, 4])
def test_matrices_are_drawn_of_the_models_that_are_there(
    number: int, tiny: Scale, tmp_path: Path, made_up: Callable
) -> None:
    request, store = Request(figures=(number,), targets=(0, 4)), Store(tmp_path)
    assert draw_figure(number, tmp_path, request, tiny, store) is None
    panel = Panel("cifar10", {1: "wanet", 4: "sig"}[number], "all_to_one")
    subject = subject_of(panel, tiny, 0, target=4)
    for s, found in ((subject, counts(target=4)), (subject.benign(), counts())):
        cell = Cell(s, "reached")
        store.write(cell, {**made_up(cell, tiny), **found})
    assert not_blank(draw_figure(number, tmp_path, request, tiny, store))


def test_the_rows_of_a_matrix_are_targets() -> None:
    matrix = panel_matrix("x", "all_to_one", {4: counts(target=4), 7: counts(target=7)})
    assert matrix.missing == [0, 1, 2, 3, 5, 6, 8, 9]
    # Nine labels' images, 52 of each lead to the target, two to each of the eight others.
    assert matrix.shares[4, 4] == pytest.approx(52 / (52 + 8 * 2))
    assert matrix.shares[7].sum() == pytest.approx(1)
    assert np.isnan(matrix.shares[0]).all()


def test_all_to_all_lies_on_the_diagonal_of_the_targets() -> None:
    matrix = panel_matrix("x", "all_to_all", {0: counts(shift=1)})
    assert np.diag(matrix.shares) == pytest.approx([52 / (52 + 8 * 2)] * 10)
    # Row 3 holds label 2's images, which cannot be misled to label 2.
    assert matrix.shares[3, 2] == 0


def test_a_benign_model_is_even() -> None:
    matrix = panel_matrix("x", "benign", {0: counts()})
    # Images of every label but the row's reach each of the others alike: 8 ways for 9 columns, 9 for the row's own.
    assert matrix.shares[0, 0] == pytest.approx(1 / 9)
    assert matrix.shares[0, 1:] == pytest.approx([8 / 81] * 9)


def test_the_eps_is_that_of_the_strongest_concentration_among_those_that_move_images() -> None:
    still = {"eps": 0.01, "counts": (100 * np.eye(10, dtype=int) + np.eye(10, k=1, dtype=int)).tolist()}
    weak, strong = (counts(target=2, eps=e)["levels"][0] for e in (0.1, 0.2))
    weak = {**weak, "counts": (np.array(weak["counts"]) + 5).tolist()}
    assert panel_matrix("x", "all_to_one", {2: {"levels": [still, weak, strong]}}).eps == 0.2
    assert panel_matrix("x", "all_to_one", {2: {"levels": [still]}}).eps == 0.01


def test_many_classes(tmp_path: Path) -> None:
    matrix = panel_matrix("gtsrb", "all_to_one", {t: counts(43, target=t) for t in range(0, 43, 2)})
    draw_matrices(tmp_path / "m.png", [matrix] * 4, "four of them")
    assert not_blank(tmp_path / "m.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_survive_their_text(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    back = torch.from_numpy(decode_png(encode_png(image)).copy())
    assert torch.equal(back if channels == 1 else back.permute(2, 0, 1), image[0] if channels == 1 else image)
