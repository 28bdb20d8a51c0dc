"""pbe-fast reproduce: what it refuses, what it draws without training, what it says of failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pbe_fast.cli import main
from pbe_fast.reproduce import SCALES, Cell, Store
from pbe_fast.reproduce.cells import Panel, subject_of


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["reproduce", *map(str, args)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "accepted: --table N, --figure N, --scan, --theorem"),
        (("--table", "6"), "table; got 6; accepted: 1, 2, 3, 4, 5"),
        (("--figure", "2"), "figure; got 2; accepted: 1, 3, 4, 5, 6, 7"),
        (("--table", "1", "--seeds", "0;1"), "whole numbers with commas"),
        (("--table", "1", "--seeds", "1,1"), "different numbers"),
        (("--table", "1", "--attack", "trojan"), "attack; got trojan; accepted: badnets"),
        (("--table", "1", "--defense", "abs"), "defense; got abs; accepted: before"),
        (("--table", "1", "--scale", "tpu"), "'tpu' is not one of"),
        (("--table", "1", "--data", "nowhere"), "--data; got nowhere, which is no folder"),
        (("--table", "3", "--weights", "nowhere.pt"), "--weights; got nowhere.pt, which is no file"),
        (("--table", "1", "--jobs", "0"), "--jobs"),
        (("--table", "1", "--scale", "cpu"), "--data; got none, for the images of cifar10; accepted: the folder"),
        (("--figure", "1", "--scale", "smoke", "--targets", "99"), "target; got 99; accepted: 0, 1, 2"),
        (("--figure", "1", "--scale", "smoke", "--targets", "3,3"), "targets; got (3, 3); accepted: different"),
    ],
)
def test_bad_input(args: tuple, message: str, tmp_path: Path) -> None:
    result = run(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_drawing_alone_trains_nothing(tmp_path: Path) -> None:
    scale = SCALES["smoke"]
    cell = Cell(subject_of(Panel("cifar10", "blend", "all_to_one"), scale, 0), "before")
    entry = {
        "cell": {"data": "digits", "attack": "blend", "setting": "all_to_one", "seed": 0, "task": "before"},
        "metrics": {"acc": 0.5, "asr": 0.75},
        "config": scale.describe("digits", "blend", "all_to_one", "before"),
        "infection": {"weights": None},
        "data": {"name": "digits", "classes": 10, "train": 9, "clean": 1},
        "commit": None,
    }
    Store(tmp_path / "smoke").write(cell, entry)
    args = ("--scale", "smoke", "--table", "1", "--figure", "6", "--attack", "blend", "--draw-only", "--out", tmp_path)
    result = run(*args)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("| Blend"))
    assert [part.strip() for part in line.split("|")[1:6]] == ["Blend", "ours", "50.00", "75.00", "–"]
    assert "**No reproduction**" in result.stdout
    assert "other options" not in result.stdout
    assert "figure 6: no cell of it is finished" in result.stderr
    assert sorted(path.name for path in (tmp_path / "smoke").iterdir()) == ["cells", "table-1.csv", "table-1.md"]
    report = json.loads(run(*args, "--json").stdout)
    assert (report["cells"], report["finished"], report["failed"]) == (9, 1, {})


def test_drawings_can_go_elsewhere(tmp_path: Path) -> None:
    args = ("--scale", "smoke", "--table", "1", "--scan", "--draw-only", "--out", tmp_path / "a")
    result = run(*args, "--drawings", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["table-1.csv", "table-1.md", "table-scan.md"]
    assert list((tmp_path / "a" / "smoke").iterdir()) == []
    assert "0 of 0 infected models" in result.stdout


def test_cells_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    result = run(
        "--scale", "cpu", "--table", "1", "--attack", "blend", "--defense", "before", "--data", tmp_path / "images",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "failed: cifar10-blend-all_to_one-target0-s0-before: images of cifar10" in result.stderr
    assert "0 of 1 cells are finished" in result.stdout
