"""Tables by value, from cells that were made up."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from pbe_fast.reproduce import SCALES, Cell, Request, Scale, Store, make_table
from pbe_fast.reproduce.cells import Panel, subject_of

CPU = SCALES["cpu"]
REQUEST = Request(tables=(1,), seeds=(0, 1, 2), attacks=("blend", "wanet"), defenses=("before", "pbe"))


def cell(attack: str, task: str, seed: int, data: str = "cifar10") -> Cell:
    return Cell(subject_of(Panel(data, attack, "all_to_one"), CPU, seed), task)


@pytest.fixture
def store(tmp_path: Path, made_up: Callable) -> Store:
    found = Store(tmp_path)
    for seed, acc in enumerate((0.90, 0.92, 0.94)):
        found.write(c := cell("blend", "before", seed), made_up(c, CPU, acc=acc, asr=1.0))
    for seed, acc in enumerate((0.89, 0.91)):
        found.write(c := cell("blend", "pbe", seed), made_up(c, CPU, acc=acc, asr=0.02))
    return found


def test_means_deviations_differences_and_what_is_missing(store: Store) -> None:
    table = make_table(1, REQUEST, CPU, store)
    assert table.cells("blend", "ours") == ["92.00 ± 2.00", "100.00 ± 0.00", "90.00 ± 1.41 (n=2)", "2.00 ± 0.00 (n=2)"]
    assert table.cells("blend", "paper") == ["94.63", "100.00", "93.98", "0.93"]
    assert table.cells("blend", "difference") == ["-2.63", "+0.00", "-3.98", "+1.07"]
    assert table.cells("wanet", "ours") == table.cells("wanet", "difference") == ["–"] * 4
    assert table.cells("wanet", "paper") == ["94.15", "99.50", "94.32", "0.46"]


def test_markdown_says_what_it_is(store: Store) -> None:
    text = make_table(1, REQUEST, CPU, store).markdown()
    lines = text.splitlines()
    assert lines[0] == "## Table 1. ACC and ASR in %: CIFAR-10, all-to-one"
    assert [part.strip() for part in lines[2].split("|")[1:-1]] == [
        "", "", "Before ACC", "Before ASR", "PBE (w/ clean) ACC", "PBE (w/ clean) ASR",
    ]  # fmt: skip
    assert "5 of 12 cells are finished" in text
    assert "Seeds 0, 1, 2" in text and "0123456789ab." in text
    # Blend: ((100 - 2) - (92 - 90) + 100) / 2; the paper's mean over both attacks.
    theirs = ((100 - 0.93) - (94.63 - 93.98) + 100) / 4 + ((99.50 - 0.46) + 100) / 4
    assert f"PBE (w/ clean) 98.0 of 1 attacks (paper {theirs:.1f})" in text
    assert "other options" not in text


def test_csv_has_the_same_figures(store: Store, tmp_path: Path) -> None:
    _, path = make_table(1, REQUEST, CPU, store).save(tmp_path)
    with path.open(newline="") as file:
        rows = {(row["row"], row["figure"]): row for row in csv.DictReader(file)}
    assert float(rows["Blend", "mean"]["Before ACC"]) == pytest.approx(92)
    assert float(rows["Blend", "std"]["PBE (w/ clean) ACC"]) == pytest.approx(2**0.5, abs=1e-4)
    assert rows["Blend", "seeds"]["PBE (w/ clean) ACC"] == "2"
    assert rows["WaNet", "mean"]["Before ACC"] == rows["WaNet", "difference"]["Before ACC"] == ""
    assert rows["WaNet", "seeds"]["Before ACC"] == "0"
    assert float(rows["WaNet", "paper"]["Before ASR"]) == 99.5


def test_one_seed_is_called_one(store: Store) -> None:
    table = make_table(1, Request(tables=(1,), attacks=("blend",), defenses=("before",)), CPU, store)
    assert table.cells("blend", "ours") == ["90.00", "100.00"]
    assert "a direction, not a mean" in table.markdown()


def test_cells_of_other_options_are_told(store: Store, made_up: Callable) -> None:
    c = cell("wanet", "pbe", 0)
    entry = made_up(c, CPU, acc=0.9, asr=0.1)
    entry["config"]["options"] = {"eps": 1.0}
    store.write(c, entry)
    assert "other options" in make_table(1, REQUEST, CPU, store).markdown()


def test_an_attack_that_takes_longer_says_so_and_is_not_of_other_options(store: Store, made_up: Callable) -> None:
    scale = dataclasses.replace(CPU, longer={("wanet", "all_to_one"): 3})
    c = cell("wanet", "before", 0)
    store.write(c, made_up(c, scale, acc=0.9, asr=0.1))
    text = make_table(1, REQUEST, scale, store).markdown()
    assert "Trained for 30 epochs: WaNet." in text
    assert "other options" not in text
    # Made at a time when it had no more epochs than the others.
    store.write(c, made_up(c, CPU, acc=0.9, asr=0.1))
    text = make_table(1, REQUEST, scale, store).markdown()
    assert "Trained for" not in text
    assert "other options" in text


@pytest.mark.parametrize(("task", "told"), [("pbe", False), ("pbe_no_clean", True)])
def test_options_that_a_cell_has_no_use_for_are_not_told(
    store: Store, made_up: Callable, task: str, told: bool
) -> None:
    entry = made_up(c := cell("wanet", task, 0), CPU, acc=0.9, asr=0.1)
    entry["config"]["options"]["steady_share"] = 0.99
    store.write(c, entry)
    table = make_table(1, Request(tables=(1,), attacks=("wanet",), defenses=(task,)), CPU, store)
    assert ("other options" in table.markdown()) == told


def test_table_3_says_that_there_are_no_imagenet_weights(tmp_path: Path, made_up: Callable) -> None:
    request, store = Request(tables=(3,), attacks=("blend",), defenses=("before",)), Store(tmp_path)
    assert "No ImageNet weights" not in make_table(3, request, CPU, store).markdown()
    c = cell("blend", "before", 0, "tiny-imagenet")
    entry = made_up(c, CPU, acc=0.5, asr=1.0)
    store.write(c, entry)
    assert "No ImageNet weights" in make_table(3, request, CPU, store).markdown()
    entry["infection"]["weights"] = "abc"
    store.write(c, entry)
    assert "No ImageNet weights" not in make_table(3, request, CPU, store).markdown()


def test_a_table_without_rows(tmp_path: Path) -> None:
    request = Request(tables=(3,), attacks=("input_aware",))
    assert "0 of 0 cells are finished" in make_table(3, request, CPU, Store(tmp_path)).markdown()


def test_table_5(tmp_path: Path, tiny: Scale, made_up: Callable) -> None:
    request, store = Request(tables=(5,), attacks=("blend", "badnets")), Store(tmp_path)
    c = Cell(subject_of(Panel("cifar10", "blend", "all_to_one"), tiny, 0), "features")
    store.write(c, made_up(c, tiny, d_clean=9.0, d_benign=8.0, d_infected=3.0))
    table = make_table(5, request, tiny, store)
    assert dict(table.columns) == {"badnets": "BadNets", "blend": "Blend"}
    assert table.cells("benign", "ours") == ["–", "8.00"]
    assert table.cells("benign", "difference") == ["–", f"{8 - 124.22:+.2f}"]
    assert table.cells("clean", "paper") == ["–", "–"]
    assert table.cells("infected", "paper") == ["–", "75.09"]
