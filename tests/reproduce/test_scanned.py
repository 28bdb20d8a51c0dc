"""The table of scans, from cells that were made up, and one that was not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from pbe_fast.config import ScanConfig
from pbe_fast.reproduce import SCALES, Cell, Job, Request, Scale, Store, Subject, cells_of, make_cells
from pbe_fast.reproduce.scanned import is_right, make_scan_table

CPU = SCALES["cpu"]
TO_ONE = Subject("cifar10", "blend", "all_to_one", 0, 0)
TO_ALL = Subject("cifar10", "blend", "all_to_all", 0, 0)
BENIGN = TO_ONE.benign()
REQUEST = Request(scan=True, attacks=("blend",))


def found(verdict: str, *, target: int | None = None, shift: int | None = None) -> dict:
    return {"verdict": verdict, "target_label": target, "shift": shift, "score": 4.25, "p_value": 0.0012}


@pytest.mark.parametrize(
    ("subject", "metrics", "right"),
    [
        (TO_ONE, found("all_to_one", target=0), True),
        (TO_ONE, found("all_to_one", target=3), False),
        (TO_ONE, found("all_to_all", shift=1), False),
        (TO_ALL, found("all_to_all", shift=1), True),
        (TO_ALL, found("all_to_all", shift=2), False),
        (TO_ALL, found("none"), False),
        (BENIGN, found("none"), True),
        (BENIGN, found("all_to_one", target=0), False),
    ],
)
def test_what_counts_as_right(subject: Subject, metrics: dict, right: bool) -> None:
    assert is_right(subject, metrics) is right


def test_both_settings_and_the_benign_model_are_scanned_once() -> None:
    request = Request(scan=True, seeds=(0, 1), attacks=("blend", "wanet"))
    cells = cells_of(request, CPU)
    assert {cell.task for cell in cells} == {"scan"}
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 + 1)
    assert Cell(BENIGN, "scan") in cells and Cell(TO_ALL, "scan") in cells
    assert cells_of(Request(seeds=(0, 1)), CPU) == []


def test_the_table_counts_hits_and_false_alarms(tmp_path: Path, made_up: Callable) -> None:
    store = Store(tmp_path)
    store.write(c := Cell(TO_ONE, "before"), made_up(c, CPU, acc=0.8, asr=0.987))
    store.write(c := Cell(TO_ONE, "scan"), made_up(c, CPU, **found("all_to_one", target=0)))
    store.write(c := Cell(TO_ALL, "scan"), made_up(c, CPU, **found("all_to_all", shift=3)))
    text = make_scan_table(REQUEST, CPU, store)
    assert "right target: 1 of 2 infected models. False alarms: 0 of 0 benign" in text
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == ["Blend", "all-to-one", "0", "98.7", "all-to-one", "0", "4.2", "0.0012", "yes"]
    assert rows[3] == ["Blend", "all-to-all", "0", "–", "all-to-all", "y + 3", "4.2", "0.0012", "no"]
    assert rows[4] == ["benign", "–", "0", "–", "–", "–", "–", "–", "–"]
    store.write(c := Cell(BENIGN, "scan"), made_up(c, CPU, **found("all_to_one", target=5)))
    text = make_scan_table(REQUEST, CPU, store)
    assert "False alarms: 1 of 1 benign" in text and "other options" not in text
    fewer = dataclasses.replace(CPU, scan=ScanConfig(images=100))
    assert "- Made with other options than the present ones of this scale: scan (Blend, benign)." in make_scan_table(
        REQUEST, fewer, store
    )


def test_a_model_is_scanned_with_its_clean_images(tmp_path: Path, tiny: Scale) -> None:
    # Long enough a training that there are answers to move.
    plan = dataclasses.replace(tiny.plans["digits"], epochs=12, limit=1000)
    scan = ScanConfig(eps=(0.2, 0.5, 0.9), steps=2, images=60)
    scale = dataclasses.replace(tiny, plans={"digits": plan}, scan=scan)
    request = Request(scan=True, attacks=("badnets",))
    assert make_cells(cells_of(request, scale), Job(scale=scale, root=tmp_path), show_progress=False) == {}
    store = Store(tmp_path)
    for cell in cells_of(request, scale):
        entry = store.read(cell)
        assert entry is not None
        assert 0 <= entry["metrics"]["p_value"] <= 1
        assert entry["scan"]["images"] <= 60
        assert entry["config"]["options"]["steps"] == 2
    assert "of 2 infected models" in make_scan_table(request, scale, store)
