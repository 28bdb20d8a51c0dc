"""attack, purify, rank, evaluate, export, verify: each reads what the one before it wrote."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import pbe_fast.result
from pbe_fast.cli import main
from pbe_fast.data import ImageSet, as_image_set, save_npz
from pbe_fast.models import load_model

METRICS = {"acc", "asr", "asr_with_target", "recovered_acc"}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def report_of(*args: object) -> dict:
    result = run(*args, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def infected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chain") / "infected"
    arch = ("--arch", "small_cnn", "--width", 4, "--epochs", 3, "--lr", 0.1, "--batch-size", 64)
    sets = ("--data", "digits:train", "--test", "digits:test", "--limit", 300, "--clean-count", 60)
    result = run("attack", *sets, *arch, "--seed", 3, "--precision", "fp32", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| model")
    assert "poisoned 30 of 300 images" in result.stderr
    return out


@pytest.fixture(scope="module")
def purified(infected: Path) -> Path:
    out = infected.parent / "purified"
    few = ("--adversarial-steps", 2, "--clean-steps", 2, "--clean-epochs", 0, "--steps", 2, "--eps", "12/255")
    result = run("purify", "--model", infected, "--clean", infected / "clean.npz", *few, "--out", out)
    assert result.exit_code == 0, result.output
    assert "suspected: " in result.stdout
    return out


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
    same = (untouched[:, None] == clean.images.flatten(1)[None]).all(-1)
    twins = sum(len({tuple(row.tolist())}) for row in everything) - len({tuple(row.tolist()) for row in everything})
    assert twins == 0, "the digits hold no two equal images, or this test shows nothing"
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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def test_a_baseline_writes_the_same_files_and_what_it_found(infected: Path, tmp_path: Path) -> None:
    few = ("--trigger-rounds", 2, "--updates-per-round", 2, "--epochs", 1, "--min-updates", 2)
    out = tmp_path / "nc"
    args = ("--model", infected, "--clean", infected / "clean.npz", "--method", "nc", *few, "--out", out)
    result = run("purify", *args)
    assert result.exit_code == 0, result.output
    assert "Neural Cleanse with 60 clean images" in result.stderr
    assert "| Neural Cleanse |" in result.stdout
    pictures = {f"trigger_{label}.png" for label in range(10)}
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "config.json", "ranking.csv", "report.json", "report.html", "figure.png", *pictures,
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "nc" and "recipe" not in report and report["config"]["trigger_rounds"] == 2
    assert f"\nunlearning: {report['rounds'][-1]['finding']}\n" in result.stdout
    assert all(report["sha256"]["outputs"][name] == digest(out / name) for name in pictures)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 11 and "<figcaption>trigger 7</figcaption>" in page
    assert "<h2>Steps</h2>" in page and "Neural Cleanse" in page


@pytest.mark.parametrize("method", ["ft", "fp", "nad", "anp"])
def test_the_other_baselines(infected: Path, method: str, tmp_path: Path) -> None:
    few = ("--iterations", 2) if method == "anp" else ("--epochs", 1, "--min-updates", 2)
    clean = ("--clean", infected / "clean.npz")
    report = report_of("purify", "--model", infected, *clean, "--method", method, *few, "--out", tmp_path / "out")
    assert report["method"] == method and report["rounds"][-1]["step"] in ("fine-tuning", "distillation", "pruning")
    assert report["purified"].keys() == METRICS and report["ranking"]["images"] == 300
    # Not in the text, that is: letters in a row make up many a picture.
    assert "PBE" not in re.sub(r"base64,[^\"]*", "", (tmp_path / "out" / "report.html").read_text())


def test_without_a_clean_set_all_rounds_of_the_paper(infected: Path, tmp_path: Path) -> None:
    few = ("--fractions", "0.1,0.5", "--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    report = report_of("purify", "--model", infected, "--recipe", "paper", *few, "--out", tmp_path / "out")
    assert [entry["extra_set_size"] for entry in report["rounds"]] == [30, 150]
    assert report["config"]["finetune"]["distill_weight"] == 0 and report["config"]["initial"] == "random"
    assert all({"ap_of_poisoned", "ap_of_clean", "extra_set_poison_rate"} <= entry.keys() for entry in report["rounds"])


def test_a_profile_is_printed_stored_and_traced(infected: Path, tmp_path: Path) -> None:
    few = ("--fractions", 0.3, "--adversarial-steps", 2, "--clean-steps", 2, "--clean-epochs", 0, "--steps", 1)
    args = ("purify", "--model", infected, *few, "--out", tmp_path / "out", "--force")
    result = run(*args, "--profile", "--device-memory-limit", 0)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [row["phase"] for row in report["profile"]["phases"]]
    # Steady images are looked for, and labels left out, where no label attracts.
    always = [name for name in names if name != "steady images" and not name.startswith("labels left out")]
    assert always == ["infected logits", "attracting labels", "adversarial", "clean", "ranking"]
    table = result.stderr[result.stderr.index("phase  ") :].splitlines()[1 : len(names) + 1]
    assert all(line.startswith(name) and line.endswith("%") for line, name in zip(table, names, strict=True))
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any(event["name"] == "aten::conv2d" for event in trace["traceEvents"])
    # The next run is not profiled, and must not pass for it.
    assert run(*args).exit_code == 0
    assert not (tmp_path / "out" / "trace.json").exists()
    assert "profile" not in json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_baseline_has_no_profile(infected: Path, tmp_path: Path) -> None:
    clean = ("--clean", infected / "clean.npz", "--out", tmp_path / "out")
    for flag in (("--profile",), ("--device-memory-limit", 5)):
        result = run("purify", "--model", infected, *clean, "--method", "ft", *flag)
        assert result.exit_code == 2
        assert "are for --method pbe, not for ft" in result.stderr


def test_weights_without_a_config_and_images_of_unknown_truth(infected: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((infected / "model.safetensors").read_bytes())
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    args = ("purify", "--model", weights, "--clean", "digits:train", "--clean-count", 50, *few)
    report = report_of(*args, "--arch", "small_cnn", "--out", tmp_path / "out")
    assert report["purified"] == dict.fromkeys(METRICS) and report["rounds"][0]["extra_set_size"] == 50
    assert not (tmp_path / "out" / "ranking.csv").exists()
    _, spec = load_model(tmp_path / "out")
    assert (spec.arch, spec.width) == ("small_cnn", 4)


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


def test_options_that_change_nothing_are_told(infected: Path, tmp_path: Path) -> None:
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    args = ("purify", "--model", infected, "--clean", infected / "clean.npz", *few, "--out", tmp_path / "out")
    result = run(*args, "--fractions", "0.5,1", "--hard-quantile", 0.5)
    assert result.exit_code == 0, result.output
    assert "note: --fractions, --hard-quantile changes nothing with --clean" in result.stderr
    assert "changes nothing" not in run(*args, "--force").stderr
    without = ("purify", "--model", infected, *few, "--fractions", 0.5, "--no-leave-out", "--out", tmp_path / "none")
    assert "note: --refining-fractions changes nothing without" in run(*without, "--refining-fractions", 0.5).stderr
    assert "changes nothing" not in run(*without, "--force").stderr


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


def test_a_run_that_cannot_be_written_leaves_the_old_one(
    infected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    args = ("purify", "--model", infected, "--clean", infected / "clean.npz", *few, "--out", tmp_path / "out")
    assert run(*args).exit_code == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pbe_fast.result, "write_ranking", full)
    result = run(*args, "--force", "--seed", 1)
    assert result.exit_code == 2 and "no space left" in result.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_force_replaces_a_run_and_what_was_made_from_it(infected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ("--adversarial-steps", 1, "--clean-steps", 1, "--clean-epochs", 0, "--steps", 1)
    args = ("purify", "--model", infected, "--clean", infected / "clean.npz", *few, "--out", out)
    report_of(*args)
    (out / "model.onnx").write_bytes(b"made from the old model")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused = run(*args)
    assert refused.exit_code == 2 and "already holds a run" in refused.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    report_of(*args, "--seed", 1, "--force")
    assert not (out / "model.onnx").exists()
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


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
