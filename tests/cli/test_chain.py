"""attack, purify, rank, evaluate, export, verify: each reads what the one before it wrote."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import METRICS, digest, report_of, run

from pbe_fast.data import ImageSet, as_image_set, save_npz


def test_attack_writes_all_that_the_next_steps_need(infected: Path) -> None:
    assert {p.name for p in infected.iterdir()} == {
        "model.safetensors", "config.json", "train.npz", "clean.npz", "test.npz", "triggered.npz",
        "poison_indices.json", "report.json",
    }  # fmt: skip
    train, clean, test, triggered = (
        as_image_set(infected / f"{n}.npz") for n in ("train", "clean", "test", "triggered")
    )
    assert (len(train), len(clean), len(test), len(triggered)) == (300, 60, 359, 359)
    assert train.poison_mask is not None and train.true_labels is not None
    indices = json.loads((infected / "poison_indices.json").read_text())["indices"]
    assert indices == train.poison_mask.nonzero()[:, 0].tolist()
    assert (train.labels[indices] == 0).all() and (train.true_labels[indices] != 0).all()
    assert triggered.true_labels is not None and torch.equal(triggered.true_labels, test.labels)
    report = json.loads((infected / "report.json").read_text())
    assert report["infected"].keys() == METRICS and report["seed"] == 3
    assert report["config"]["epochs"] == 3 == len(report["losses"])


def test_the_attack_never_sees_the_clean_set(infected: Path) -> None:
    train, clean = as_image_set(infected / "train.npz"), as_image_set(infected / "clean.npz")
    assert train.poison_mask is not None
    untouched = train.images[~train.poison_mask].flatten(1)
    everything = as_image_set("digits:train").images.flatten(1)
    assert len(everything.unique(dim=0)) == len(everything), "two digits are equal: this test would show nothing"
    same = (untouched[:, None] == clean.images.flatten(1)[None]).all(-1)
    assert not same.any()


def test_purify_writes_the_model_the_ranking_and_the_report(infected: Path, purified: Path) -> None:
    assert {p.name for p in purified.iterdir()} == {
        "model.safetensors", "config.json", "ranking.csv", "report.json", "report.html", "figure.png",
    }  # fmt: skip
    report = json.loads((purified / "report.json").read_text())
    assert report["infected"].keys() == report["purified"].keys() == METRICS
    assert report["infected"] == json.loads((infected / "report.json").read_text())["infected"]
    assert report["config"]["pgd"]["eps"] == 12 / 255 and report["config"]["adversarial_steps"] == 2
    assert report["recipe"] == "pbe" and report["seed"] == 0 and len(report["rounds"]) == 3
    assert {"reading", "adversarial", "clean", "ranking", "evaluation", "total"} <= report["seconds"].keys()
    assert report["versions"]["torch"] == str(torch.__version__) and report["machine"]["cores"] >= 1
    inputs = report["sha256"]["inputs"]
    assert inputs["model"]["sha256"] == digest(infected / "model.safetensors")
    assert inputs["clean"]["sha256"] == digest(infected / "clean.npz")
    for name, value in report["sha256"]["outputs"].items():
        assert value == digest(purified / name)


def test_the_ranking_file(infected: Path, purified: Path) -> None:
    with (purified / "ranking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "score", "suspected"]
    assert sorted(int(row["index"]) for row in rows) == list(range(300))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    labels = as_image_set(infected / "train.npz").labels
    assert all(int(row["label"]) == labels[int(row["index"])] for row in rows)
    flags = [int(row["suspected"]) for row in rows]
    report = json.loads((purified / "report.json").read_text())
    assert flags == sorted(flags, reverse=True) and sum(flags) == report["ranking"]["suspected"] > 0


def test_rank_gives_the_same_ranking_from_the_two_models(infected: Path, purified: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.csv"
    report = report_of(
        "rank", "--infected", infected, "--purified", purified, "--data", infected / "train.npz", "--out", out
    )
    assert out.read_text() == (purified / "ranking.csv").read_text()
    assert report["ranking"] == json.loads((purified / "report.json").read_text())["ranking"]
    assert report["sha256"]["outputs"] == {str(out): digest(out)}


def test_evaluate_measures_what_purify_reported(infected: Path, purified: Path) -> None:
    sets = ("--test", infected / "test.npz", "--triggered", infected / "triggered.npz")
    report = report_of("evaluate", "--model", infected, "--model", purified, *sets)
    written = json.loads((purified / "report.json").read_text())
    assert (report["infected"], report["purified"]) == (written["infected"], written["purified"])
    table = run("evaluate", "--model", purified, "--test", infected / "test.npz").stdout
    assert f"{100 * written['purified']['acc']:.1f}" in table and "ASR" not in table


def test_export_and_verify(infected: Path, purified: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = run("export", "--model", purified)
    assert result.exit_code == 0, result.output
    onnx = purified / "model.onnx"
    again = run("export", "--model", purified)
    assert again.exit_code == 2 and "--force" in again.stderr

    sets = ("--test", infected / "test.npz", "--triggered", infected / "triggered.npz")
    found = run("verify", "--onnx", onnx, "--model", purified, *sets)
    assert found.exit_code == 0, found.output
    assert "computes what the model computes" in found.stdout
    report = json.loads((purified / "report.json").read_text())
    assert report["onnx"]["max_abs_diff"] <= 1e-4 and report["onnx"]["argmax_agreement"] == 1.0
    assert report["onnx"]["acc"] == report["purified"]["acc"] and report["onnx"]["asr"] == report["purified"]["asr"]
    assert "ONNX file" in (purified / "report.html").read_text()

    other = run("verify", "--onnx", onnx, "--model", infected, *sets)
    assert other.exit_code == 1
    assert "differs from the model" in other.stdout and "accepted: 0.0001" in other.stderr
    large = tmp_path / "large.npz"
    save_npz(as_image_set("digits:test", size=20), large)
    wrong = run("verify", "--onnx", onnx, "--model", purified, "--test", large)
    assert wrong.exit_code == 2 and "got (1, 20, 20); accepted: (1, 16, 16)" in wrong.stderr
    assert "--image-size" in wrong.stderr
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(onnx.read_bytes()[:2000])
    assert run("verify", "--onnx", damaged, "--model", purified, *sets).exit_code == 1
    assert run("verify", "--onnx", purified / "model.safetensors", "--model", purified, *sets).exit_code == 2
    assert run("verify", "--onnx", tmp_path / "no.onnx", "--model", purified, *sets).exit_code == 2


def test_spare_logits_are_told_once(infected: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.npz"
    data = as_image_set("digits:test")
    chosen = (data.labels < 4).nonzero()[:, 0]
    save_npz(ImageSet(data.images[chosen], data.labels[chosen], tuple("abcd")), few)
    # Weights alone say nothing of classes.
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((infected / "model.safetensors").read_bytes())
    args = ("evaluate", "--model", weights, "--arch", "small_cnn", "--test", few)
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("note: the data has 4 classes and the model 10 logits") == 1
    assert run(*args, "--quiet").stderr == ""


def test_a_model_of_ones_own_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"own_{abs(hash(tmp_path))}"
    # No convolution, from which the channels of the images could be read.
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    digits = as_image_set("digits:train", size=8).select(range(200))
    weight = torch.linalg.pinv(digits.floats().flatten(1), rtol=1e-2) @ torch.eye(10)[digits.labels] * 9
    torch.save({"1.weight": weight.T, "1.bias": torch.zeros(10)}, tmp_path / "my.pt")
    names = tuple(f"c{k}" for k in range(10))
    save_npz(ImageSet(digits.images, digits.labels, names), tmp_path / "clean.npz")
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    few += ("--lr", 1e-6)  # still right about its images, or there would be nothing to scan
    own, out, clean = ("--arch", f"{name}:make"), tmp_path / "om", tmp_path / "clean.npz"
    done = run("purify", "--model", tmp_path / "my.pt", *own, "--clean", clean, *few, "--out", out)
    assert done.exit_code == 0, done.output
    spec = json.loads((out / "config.json").read_text())["model"]
    assert spec == {
        "arch": f"{name}:make", "num_classes": 10, "in_channels": 1, "image_size": [8, 8], "width": None, "mean": None,
        "std": None, "class_names": list(names),
    }  # fmt: skip
    monkeypatch.delitem(sys.modules, name)
    foreign = run("export", "--model", out)
    assert foreign.exit_code == 2 and "names code to import" in foreign.stderr and name not in sys.modules
    for command in (
        ("export", "--model", out),
        ("evaluate", "--model", out, "--test", clean),
        ("verify", "--onnx", out / "model.onnx", "--model", out, "--test", clean),
        ("rank", "--infected", tmp_path / "my.pt", "--purified", out, "--data", clean, "--out", tmp_path / "r.csv"),
        ("scan", "--model", out, "--data", clean, "--images", 30, "--steps", 1),
    ):
        result = run(*command, *own)
        assert result.exit_code == 0, result.output


def test_images_of_another_size_than_the_models_are_refused(infected: Path, tmp_path: Path) -> None:
    model, out = ("--model", infected), tmp_path / "out"
    save_npz(as_image_set("digits:test", size=8), tmp_path / "8.npz")
    commands = (
        ("purify", *model, "--clean", infected / "clean.npz", "--out", out),
        ("scan", *model, "--data", infected / "clean.npz"),
        ("rank", "--infected", infected, "--purified", infected, "--data", infected / "clean.npz", "--out", out / "r"),
        ("evaluate", *model, "--test", infected / "test.npz"),
        ("verify", *model, "--test", infected / "test.npz", "--onnx", "none.onnx"),
        ("export", *model, "--out", out / "m.onnx"),
    )
    for command in commands:
        result = run(*command, "--image-size", 8)
        assert result.exit_code == 2 and not out.exists(), result.output
        wanted = f"images (--image-size); got 8x8; accepted: 16x16, as the config.json of {infected} says"
        assert wanted in result.stderr
    for command in commands[:4]:
        small = [str(a).replace(str(infected / "clean.npz"), str(tmp_path / "8.npz")) for a in command]
        small = [a.replace(str(infected / "test.npz"), str(tmp_path / "8.npz")) for a in small]
        result = run(*small)
        assert result.exit_code == 2, result.output
        assert "8.npz; got 8x8; accepted: 16x16" in result.stderr and "; --image-size 16 resizes" in result.stderr
    assert run(*small, "--image-size", 16).exit_code == 0
