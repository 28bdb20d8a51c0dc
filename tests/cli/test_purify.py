"""purify: its methods and recipes, what it tells, and what becomes of an earlier run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import METRICS, digest, report_of, run

import pbe_fast.result
from pbe_fast.models import load_model


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
    assert always == ["infected logits", "leading waves", "attracting labels", "adversarial", "clean", "ranking"]
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
