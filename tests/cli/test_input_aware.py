"""The attack whose trigger is trained, through the files that the commands leave each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pbe_fast.cli import main
from pbe_fast.data import as_image_set
from pbe_fast.metrics import evaluate
from pbe_fast.models import load_model
from pbe_fast.poison import covered_test_set, triggered_test_set
from pbe_fast.runs import load_trigger


def run(*args: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def infected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("input_aware") / "infected"
    sets = ("--data", "digits:train", "--test", "digits:test", "--limit", 150, "--clean-count", 40)
    net = ("--arch", "small_cnn", "--width", 4, "--epochs", 1, "--mask-share", 2, "--trigger-option", "width=4")
    attack = ("--attack", "input_aware", "--setting", "all_to_all", "--seed", 3, "--precision", "fp32")
    run("attack", *sets, *net, *attack, "--out", out)
    return out


def test_the_files_hold_what_the_trigger_loaded_again_makes(infected: Path) -> None:
    report = json.loads((infected / "report.json").read_text())
    assert "trigger.safetensors" in report["sha256"]["outputs"]
    trigger = load_trigger(infected)
    test, triggered = (as_image_set(infected / f"{name}.npz") for name in ("test", "triggered"))
    again = triggered_test_set(test, trigger, setting="all_to_all")
    assert torch.equal(again.images, triggered.images)
    assert torch.equal(again.labels, (test.labels + 1) % 10)
    assert torch.equal(again.labels, triggered.labels)
    model, _ = load_model(infected)
    assert evaluate(model, test, again).to_dict() == report["infected"]
    cover = covered_test_set(test, trigger, setting="all_to_all")
    assert cover.true_labels is not None
    metrics = evaluate(model, dataclasses.replace(cover, labels=cover.true_labels), cover)
    assert report["cover"] == {"acc": metrics.acc, "asr": metrics.asr}


def test_evaluate_and_purify_read_it(infected: Path) -> None:
    sets = ("--test", infected / "test.npz", "--triggered", infected / "triggered.npz")
    report = json.loads(run("evaluate", "--model", infected, *sets, "--json", "--quiet"))
    assert report["infected"] == json.loads((infected / "report.json").read_text())["infected"]
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    out = infected.parent / "purified"
    run("purify", "--model", infected, "--clean", infected / "clean.npz", *few, "--out", out, "--quiet")
    assert json.loads((out / "report.json").read_text())["ranking"]["poisoned"] == 15
