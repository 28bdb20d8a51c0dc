"""Which cells there are, and what the paper says of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from importlib import resources

import pytest

from pbe_fast.data import as_image_set
from pbe_fast.errors import InputError
from pbe_fast.reproduce import SCALES, Request, Subject, cells_of, find_scale
from pbe_fast.reproduce.cells import ATTACKS, DEFENSES, TABLES
from pbe_fast.reproduce.paper import METRICS, paper_ap, paper_distance, paper_value
from pbe_fast.reproduce.tables import ATTACK_NAMES, DEFENSE_NAMES, defense_rating
from pbe_fast.reproduce.workshop import attack_config

CPU, GPU = SCALES["cpu"], SCALES["gpu"]


def test_a_table_takes_every_attack_with_every_defence_and_a_benign_model() -> None:
    cells = cells_of(Request(tables=(1,)), CPU)
    assert len({cell.name for cell in cells}) == len(cells) == 5 * 8 + 1
    assert {(c.subject.attack, c.task) for c in cells} == {(a, d) for a in ATTACKS for d in DEFENSES} | {
        ("benign", "before")
    }
    assert {(c.subject.data, c.subject.setting) for c in cells} == {("cifar10", "all_to_one"), ("cifar10", "")}
    assert len(cells_of(Request(tables=(3,)), CPU)) == 4 * 8 + 1
    # Table 4 shares no more than the benign model with Table 1.
    assert len(cells_of(Request(tables=(1, 4)), CPU)) == 2 * 5 * 8 + 1


def test_cells_of_one_model_follow_each_other_and_the_first_seed_comes_first() -> None:
    cells = cells_of(Request(tables=(1,), figures=(6, 7), seeds=(5, 2)), CPU)
    subjects = [cell.subject for cell in cells]
    changes = sum(a != b for a, b in itertools.pairwise(subjects))
    assert changes == len(set(subjects)) - 1
    seeds = [subject.seed for subject in subjects]
    assert seeds == sorted(seeds, key=[5, 2].index)
    # What Fig. 6 and 7 show is in the table already.
    assert len(cells) == 2 * (5 * 8 + 1)


def test_figures_of_one_attack_take_one_model_and_matrices_one_per_target() -> None:
    tasks = {number: [c.task for c in cells_of(Request(figures=(number,)), GPU)] for number in (3, 5, 6, 7)}
    assert tasks == {3: ["features"], 5: ["tsne"], 6: ["pbe_no_clean"], 7: ["pbe_no_clean", "before"]}
    assert len(cells_of(Request(figures=(1,)), GPU)) == 10 + 1
    assert len(cells_of(Request(figures=(1,), targets=(3, 7), seeds=(0, 1)), GPU)) == 2 + 1
    features = cells_of(Request(figures=(3,)), GPU)[0]
    assert [s.attack for s in features.subjects()] == ["benign", "blend"]


def test_the_small_scale_shows_in_its_matrices_the_models_of_its_tables() -> None:
    shown = {cell.subject for cell in cells_of(Request(figures=(1, 4)), CPU) if cell.subject.attack != "benign"}
    assert shown <= {cell.subject for cell in cells_of(Request(tables=(1, 2, 4)), CPU)}
    assert {(subject.data, subject.target) for subject in shown} == {("cifar10", 0), ("gtsrb", 2)}
    of_others = cells_of(Request(figures=(4,), targets=(5,)), CPU)
    assert {cell.subject.target for cell in of_others if cell.subject.setting == "all_to_one"} == {5}


def test_smoke_is_all_digits_and_says_so() -> None:
    smoke = SCALES["smoke"]
    assert {c.subject.data for c in cells_of(Request(tables=(1, 2, 3, 4, 5), figures=(1, 4, 5)), smoke)} == {"digits"}
    assert "No reproduction" in smoke.note
    assert set(GPU.plans) == set(CPU.plans) == {table.data for table in TABLES.values()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tables": (6,)}, "table; got 6; accepted: 1, 2, 3, 4, 5"),
        ({"figures": (2,)}, "figure; got 2; accepted: 1, 3, 4, 5, 6, 7"),
        ({"attacks": ("badnet",)}, "attack; got badnet; accepted: badnets, blend"),
        ({"defenses": ("pbe", "fst")}, "defense; got fst; accepted: before, ft"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (2**32,)}, "seeds"),
    ],
)
def test_what_there_is_not(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(**wrong)


def test_an_attack_that_takes_longer_is_trained_longer() -> None:
    scale = dataclasses.replace(SCALES["smoke"], longer={("blend", "all_to_all"): 3})
    data = as_image_set("digits:train", progress=False)
    epochs = {
        (attack, setting): attack_config(scale, Subject("digits", attack, setting, 0, 0), data).epochs
        for attack, setting in itertools.product(("blend", "wanet"), ("all_to_one", "all_to_all"))
    }
    assert epochs.pop(("blend", "all_to_all")) == 60
    assert set(epochs.values()) == {20}


def test_an_unknown_scale() -> None:
    with pytest.raises(InputError, match="scale; got 'tpu'; accepted: gpu, cpu, smoke"):
        find_scale("tpu")


def test_the_transcription_is_whole() -> None:
    for number, table in TABLES.items():
        for attack in table.attacks:
            for defense in DEFENSES:
                for metric in METRICS:
                    value = paper_value(number, attack, defense, metric)
                    assert value is not None and 0 <= value <= 100
    raw = json.loads(resources.files("pbe_fast.reproduce").joinpath("paper.json").read_text(encoding="utf-8"))
    counted = {number: (len(rows), {len(row) for row in rows.values()}) for number, rows in raw["tables"].items()}
    assert counted == {"1": (5, {8}), "2": (5, {8}), "3": (4, {8}), "4": (5, {8}), "5": (5, {2})}
    assert set(ATTACK_NAMES) == set(ATTACKS) and set(DEFENSE_NAMES) == set(DEFENSES)
    assert paper_value(3, "input_aware", "pbe", "acc") is None
    # The text of the paper has no figures for BadNets here.
    assert {a for a in ATTACKS if paper_distance(a, "benign") is None} == {"badnets"}
    assert paper_distance("badnets", "clean") is None


@pytest.mark.parametrize(
    ("table", "attack", "defense", "acc", "asr"),
    [
        (1, "badnets", "pbe_no_clean", 94.02, 11.30),
        (1, "wanet", "pbe", 94.32, 0.46),
        (1, "sig", "before", 94.81, 98.96),
        (2, "blend", "ft", 90.68, 40.12),
        (2, "input_aware", "nc", 99.27, 99.84),
        (3, "badnets", "before", 62.99, 99.89),
        (3, "wanet", "anp", 54.82, 16.98),
        (4, "sig", "nad", 91.53, 1.36),
        (4, "wanet", "fp", 89.02, 92.53),
    ],
)
def test_the_transcription_by_value(table: int, attack: str, defense: str, acc: float, asr: float) -> None:
    assert (paper_value(table, attack, defense, "acc"), paper_value(table, attack, defense, "asr")) == (acc, asr)


def test_the_paper_s_other_figures() -> None:
    assert (paper_distance("sig", "benign"), paper_distance("wanet", "infected")) == (135.91, 15.85)
    assert paper_ap() == (0.25, 0.93)


def test_der() -> None:
    assert defense_rating(90.0, 100.0, 88.0, 10.0) == pytest.approx(94.0)
    # A defence that helps neither way is worth a half; a gain in accuracy counts for nothing.
    assert defense_rating(90.0, 50.0, 95.0, 60.0) == pytest.approx(50.0)
