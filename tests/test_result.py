"""What a result writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pbe_fast.cli.texts import findings_text, ranking_text
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.errors import InputError, OutputError
from pbe_fast.models import SmallCNN, load_model
from pbe_fast.ranking import Ranking, rank_images
from pbe_fast.result import PurifyResult, merged, plain, read_report, sha256_of_file, summarize, write_ranking


def make_set(n: int = 12) -> ImageSet:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[:3] = True
    return ImageSet(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(n) % 4, poison_mask=mask)


def make_ranking(n: int = 12) -> Ranking:
    generator = torch.Generator().manual_seed(0)
    infected = torch.randn(n, 4, generator=generator)
    purified = infected.clone()
    purified[:3] = -purified[:3]
    return rank_images(infected, purified)


def make_result(model: nn.Module, ranked: bool = True) -> PurifyResult:
    return PurifyResult(
        model=model,
        ranking=make_ranking() if ranked else None,
        history=[{"round": 0, "clean_loss": math.nan}],
        config=PurifyConfig(),
        seed=7,
        seconds={"clean": 1.5},
        precision="float32",
        train_data=make_set() if ranked else None,
    )


def test_save_writes_a_run_that_loads(tmp_path: Path) -> None:
    model = SmallCNN(5, 1, 4).eval()
    out = make_result(model).save(tmp_path / "out", infected={"acc": 0.5}, seconds={"total": 2.0})
    loaded, spec = load_model(out)
    assert (spec.arch, spec.num_classes, spec.width, spec.image_shape) == ("small_cnn", 5, 4, (1, 8, 8))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    report = read_report(out)
    assert report is not None
    assert report["infected"] == {"acc": 0.5} and report["seconds"] == {"clean": 1.5, "total": 2.0}
    assert report["rounds"] == [{"round": 0, "clean_loss": None}] and report["seed"] == 7
    assert report["sha256"]["inputs"]["train"] == make_set().sha256()
    assert report["sha256"]["outputs"] == {
        name: sha256_of_file(out / name) for name in ("model.safetensors", "config.json", "ranking.csv")
    }
    assert report["ranking"] == {
        "images": 12, "suspected": 3, "not_finite": 0, "suspected_labels": [], "poisoned": 3,
        "ap_of_poisoned": 1.0, "ap_of_clean": 1.0, "precision": 1.0, "recall": 1.0,
    }  # fmt: skip
    with pytest.raises(OutputError, match="already holds a run"):
        make_result(model).save(out)


def test_a_model_that_came_without_training_images(tmp_path: Path) -> None:
    out = make_result(SmallCNN(5, 3, 6), ranked=False).save(tmp_path / "known")
    assert load_model(out)[1].to_dict() == {
        "arch": "small_cnn", "num_classes": 5, "in_channels": 3, "image_size": None, "width": 6, "mean": None,
        "std": None, "class_names": None,
    }  # fmt: skip
    assert not (out / "ranking.csv").exists()
    with pytest.raises(InputError, match="no ranking"):
        make_result(SmallCNN(5, 3, 6), ranked=False).suspected()
    with pytest.raises(InputError, match=r"accepted: save\(folder, spec=ModelSpec"):
        make_result(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ranked=False).save(tmp_path / "unknown")
    assert list((tmp_path / "unknown").iterdir()) == []


def test_a_ranking_with_ties_and_logits_that_are_not_finite(tmp_path: Path) -> None:
    infected = torch.eye(4)
    purified = infected.clone()
    purified[1, 0] = math.nan
    purified[2] = torch.tensor([1.0, 0, 0, 0])
    data = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([3, 2, 1, 0]))
    ranking = rank_images(infected, purified)
    with write_ranking(tmp_path / "ranking.csv", ranking, data).open() as file:
        rows = list(csv.reader(file))
    assert [row[:2] for row in rows] == [["index", "label"], ["1", "2"], ["2", "1"], ["3", "0"], ["0", "3"]]
    assert [row[3] for row in rows[1:]] == ["1", "1", "0", "0"]
    assert summarize(ranking, data) == {"images": 4, "suspected": 2, "not_finite": 1, "suspected_labels": []}


def test_labels_that_changed_far_more_than_others_are_named() -> None:
    data = dataclasses.replace(make_set(), class_names=("ant", "bee", "cat", "dog"), poison_mask=None)
    distance = torch.tensor([0.9, 0.1, 0.1, 0.2] * 3)
    ranking = Ranking(distance, distance.argsort(stable=True), 0)
    result = dataclasses.replace(make_result(SmallCNN(4, 1, 4)), ranking=ranking, train_data=data)
    assert result.suspected_labels() == [0]
    assert result.report()["ranking"]["suspected_labels"] == ["ant"]
    assert ranking_text(summarize(ranking, data)).splitlines() == [
        "suspected: 3 of 12 training images",
        "labels that changed far more than the others: ant",
    ]
    with pytest.raises(InputError, match="no ranking"):
        make_result(SmallCNN(4, 1, 4), ranked=False).suspected_labels()


def test_reports_merge_and_hold_nothing_that_json_lacks() -> None:
    assert merged({"a": {"b": 1, "c": {"d": 2}}, "e": 3}, {"a": {"c": {"f": 4}}, "e": {"g": 5}}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 4}},
        "e": {"g": 5},
    }
    values = {"x": (1, math.inf), "y": {2: Path("z")}, "n": None, "b": True}
    assert json.loads(json.dumps(plain(values), allow_nan=False)) == {
        "x": [1, None], "y": {"2": "z"}, "n": None, "b": True,
    }  # fmt: skip


def test_findings_are_told_as_lines() -> None:
    history = [
        {"step": "pruning", "finding": "pruned 3 of 8"},
        {"round": 0, "wave": {"down": 0, "across": 6, "label": 1}},
        {"round": 1},
        {"round": 0, "wave": {"down": -2, "across": 3, "shift": 4}},
    ]
    assert findings_text(history, ["cat", "dog"]) == [
        "pruning: pruned 3 of 8",
        "a wave of 0 periods down and 6 across the picture led the infected model to dog",
        "a wave of -2 periods down and 3 across the picture led the infected model from y to y + 4",
    ]
