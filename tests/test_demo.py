"""The demo, with as little training as shows that its parts fit together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.demo import attack_config, run_demo, without_step_1
from pbe_fast.errors import InputError, OutputError
from pbe_fast.models import load_model

TINY = PurifyConfig(pgd=PGDConfig(steps=1), adversarial_steps=2, clean_steps=2, clean_epochs=0, fractions=(0.1, 0.2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(out, epochs=1, config=TINY, precision="fp32", progress=False)
    return out


def test_the_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    for name in ("infected", "fine_tuned", "purified", "purified_no_clean"):
        assert report[name].keys() == {"acc", "asr", "asr_with_target", "recovered_acc"}
        assert all(0 <= value <= 1 for value in report[name].values())
    assert report["onnx"]["ok"] and report["onnx"]["argmax_agreement"] == 1.0
    assert (report["onnx"]["acc"], report["onnx"]["asr"]) == (report["purified"]["acc"], report["purified"]["asr"])
    runs = [entry["run"] for entry in report["rounds"]]
    assert runs == ["purified"] * 3 + ["purified_no_clean"] * 2
    assert [report["rounds"][i]["extra_set_size"] for i in (0, 3)] == [140, 130]
    assert report["ranking"]["images"] == 1438 - 140 and report["ranking"]["poisoned"] == 130
    assert report["seconds"]["total"] > report["seconds"]["purification"] > 0


def test_the_files(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "figure.png", "model.onnx", "model.safetensors", "ranking.csv", "report.html", "report.json",
    }  # fmt: skip
    outputs = json.loads((folder / "report.json").read_text())["sha256"]["outputs"]
    assert outputs.keys() == names - {"report.json", "report.html"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in outputs.items())
    assert load_model(folder)[1].image_shape == (1, 16, 16)


def test_a_second_run_asks_before_it_replaces_the_first(folder: Path) -> None:
    with pytest.raises(OutputError, match="already holds a run"):
        run_demo(folder, progress=False)


def test_plain_fine_tuning_gets_as_many_updates_and_nothing_of_the_paper() -> None:
    config = without_step_1(PurifyConfig(adversarial_steps=30, clean_steps=50, finetune=FineTuneConfig(lr=0.2)))
    assert (config.adversarial_steps, config.clean_steps) == (0, 80)
    assert (config.finetune.distill_weight, config.finetune.lr) == (0.0, 0.2)


def test_a_clean_label_attack_leaves_some_of_its_class_alone() -> None:
    assert attack_config("sig", 5).poison_rate < 0.1 == attack_config("blend", 5).poison_rate
    with pytest.raises(InputError, match="accepted: badnets, blend, sig, wanet"):
        attack_config("nothing", 5)
