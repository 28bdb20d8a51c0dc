"""Bad input: one line that says what was got and what is accepted, exit code 2, before any work, nothing left."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import run
from PIL import Image

from pbe_fast.data import ImageSet, as_image_set, save_npz
from pbe_fast.models import ModelSpec, SmallCNN, save_model

ATTACK = ("attack", "--data", "digits:train", "--arch", "small_cnn", "--width", "4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(SmallCNN(10, 1, 4), ModelSpec("small_cnn", 10, 1, (16, 16), 4), folder)
    return folder


@pytest.fixture
def test_set(tmp_path: Path) -> Path:
    save_npz(as_image_set("digits:test"), tmp_path / "test.npz")
    return tmp_path / "test.npz"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "nowhere.npz"), "nowhere.npz"),
        (("--data", "digits:validation"), "'digits:train' or 'digits:test'"),
        (("--test", "nowhere"), "data that does not exist; got 'nowhere'"),
        (("--arch", "resnet19"), "unknown architecture; got 'resnet19'"),
        (("--target", "10"), "target_label; got 10; accepted: 0 to 9"),
        (("--poison-rate", "1.5"), "option 'poison_rate'; got 1.5"),
        (("--attack", "sig", "--poison-rate", "0.2"), "got 288 images to poison, but 142 images of class 0"),
        (("--limit", "2000"), "got 2000 and 0; accepted: together at most 1438"),
        (("--limit", "1400", "--clean-count", "39"), "got 1400 and 39"),
        (("--device", "tpu"), "device; got 'tpu"),
        (("--lr", "-1"), "option 'lr'; got -1.0; accepted: above 0"),
        (("--trigger-option", "alpha=7"), "got 7"),
        (("--trigger-option", "colour=red"), "got 'colour'; accepted: seed, alpha, picture"),
        (("--trigger-option", "alpha=x"), "alpha of the blend trigger; got 'x'; accepted: a number"),
        (("--trigger-option", "seed=x"), "seed; got 'x'; accepted: a whole number from -2"),
        (("--attack", "wanet", "--trigger-option", "control_size=100000"), "got 100000; accepted: 1 to 1024"),
        (("--width", "100000000"), "width of a network; got 100000000; accepted: 1 to 4096"),
        (("--arch", "resnet18"), "torchvision's resnet18; got in_channels 1"),
        (("--arch", "torchvision:nope"), "unknown torchvision classifier; got 'nope'"),
        (("--device", "meta"), "device; got 'meta'"),
    ],
)
def test_attack_refuses(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*ATTACK, *args, "--out", out)
    assert result.exit_code == 2
    assert message in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.rstrip().endswith(errors[0])
    assert result.stdout == "" and not out.exists()


@pytest.mark.parametrize(
    "args",
    [
        ("attack",),
        ("purify", "--model", "m"),
        (*ATTACK, "--out", "o", "--epochs", "many"),
        (*ATTACK, "--out", "o", "--lr", "1/0"),
        (*ATTACK, "--out", "o", "--trigger-option", "alpha"),
        (*ATTACK, "--out", "o", "--trigger-option", "name=x"),
        (*ATTACK, "--out", "o", "--trigger-option", "image_shape=[1,2,3]"),
        (*ATTACK, "--out", "o", "--seed", str(2**63)),
        (*ATTACK, "--out", "o", "--augment", "auto"),
        ("purify", "--model", "m", "--out", "o", "--clean-count", "5"),
        ("purify", "--model", "m", "--out", "o", "--method", "nad"),
        ("purify", "--model", "m", "--out", "o", "--method", "nad", "--clean", "c", "--eps", "0.1"),
        ("purify", "--model", "m", "--out", "o", "--method", "sau", "--clean", "c"),
        ("nonsense",),
        ("attack", "--nonsense"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr and "Error: " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_purify_refuses_before_it_works(model: Path, test_set: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    purify = ("purify", "--model", model)
    small = tmp_path / "small.npz"
    save_npz(ImageSet(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.arange(4), tuple("0123456789AB")), small)
    sizes = tmp_path / "sizes"
    (sizes / "0").mkdir(parents=True)
    for side in (8, 9):
        Image.new("L", (side, side)).save(sizes / "0" / f"{side}.png")
    inside = ("purify", "--model", model / "model.safetensors")
    cases = [
        ((*purify, *out), "got neither train nor clean"),
        (("purify", "--model", tmp_path / "none", "--train", test_set, *out), "none"),
        ((*purify, "--clean", test_set, "--out", model), "where --model is"),
        ((*inside, "--clean", test_set, "--out", model, "--force"), "where --model is"),
        ((*purify, "--clean", test_set, "--clean-count", 5000, *out), "(--clean-count); got 5000 of 359 images"),
        ((*purify, "--clean", test_set, "--mean", "0.5", *out), "(--mean, --std); got mean without std"),
        ((*purify, "--clean", test_set, "--std", "0.5", *out), "(--mean, --std); got std without mean"),
        ((*purify, "--clean", test_set, "--restarts", 3, *out), "1, or more with random_start=True (--random-start)"),
        ((*purify, "--train", "", *out), "data; got an empty name"),
        ((*purify, "--train", sizes, *out), "(--image-size PIXELS)"),
        ((*purify, "--train", small, *out), "fewer logits than the data has classes; got 10 logits and 12 classes"),
        ((*purify, "--train", test_set, "--triggered", test_set, *out), "got no clean test images"),
        ((*purify, "--clean", test_set, "--test", test_set, "--triggered", test_set, *out), "without true labels"),
        ((*purify, "--clean", test_set, "--fractions", "0.1,2", *out), "each above 0 and at most 1"),
    ]
    for args, message in cases:
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and "one round" not in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(:\n", "cannot be imported; got SyntaxError"),
        ("raise KeyError('on import')\n", "cannot be imported; got KeyError: 'on import'"),
        ("import sys\nsys.exit(0)\n", "cannot be imported; got SystemExit: 0"),
        ("def make(num_classes):\n    raise OSError('no weights')\n", "num_classes=10; got OSError: no weights"),
        ("def make(num_classes):\n    return [0] * (1 << 62)\n", "num_classes=10; got MemoryError"),
    ],
)
def test_code_of_the_users_that_does_not_work(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"net_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("attack", "--data", "digits:train", "--arch", f"{name}:make", "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert (
        "Traceback"
        in run(
            "attack", "--data", "digits:train", "--arch", f"{name}:make", "--out", tmp_path / "out", "--debug"
        ).stderr
    )


def test_a_share_of_no_image_is_null(model: Path, test_set: Path, tmp_path: Path) -> None:
    # Every image is of the target's class: none is left for the attack success rate.
    data = as_image_set("digits:test")
    ones = data.select((data.labels == 1).nonzero()[:, 0])
    save_npz(dataclasses.replace(ones, true_labels=ones.labels), tmp_path / "triggered.npz")
    args = ("evaluate", "--model", model, "--test", test_set, "--triggered", tmp_path / "triggered.npz")
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["asr"] is None
    assert run(*args).exit_code == 0


def test_a_pickle_with_code_never_runs(test_set: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"weight": Evil()}, tmp_path / "net.pt")
    result = run("evaluate", "--model", tmp_path / "net.pt", "--arch", "small_cnn", "--test", test_set)
    assert result.exit_code == 2 and "mkdir" in result.stderr
    assert not (tmp_path / "owned").exists()


def test_occupied_and_unwritable_places(model: Path, test_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", model):
        result = run(*ATTACK, "--out", out)
        assert result.exit_code == 2 and str(out) in result.stderr, result.output
    ranking = ("rank", "--infected", model, "--purified", model, "--data", test_set, "--out")
    assert run(*ranking, tmp_path / "file").exit_code == 2
    assert run(*ranking, tmp_path).exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"
    assert run(*ranking, tmp_path / "file", "--force").exit_code == 0
    assert (tmp_path / "file").read_text().startswith("index,label,score,suspected\n")


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for folder in (out, tmp_path / "other"):
        assert run(*ATTACK, "--target", "11", "--out", folder).exit_code == 2
    assert out.is_dir() and (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_debug_shows_where_it_came_from(tmp_path: Path) -> None:
    args = (*ATTACK, "--target", "11", "--out", tmp_path / "out")
    assert "Traceback" not in run(*args).stderr
    result = run(*args, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: target_label; got 11")


def test_a_fault_of_ours_is_not_taken_for_bad_input(
    test_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The user's own network fails in a way that nothing foresees: after the check, on the real batch.
    (tmp_path / "strange_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(256, 10)\n"
        "    def forward(self, x):\n"
        "        if len(x) > 2:\n"
        "            raise ZeroDivisionError('out of the blue')\n"
        "        return self.linear(x.flatten(1))\n"
        "def make(num_classes):\n"
        "    return Net()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run("attack", "--data", test_set, "--arch", "strange_net:make", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "out of the blue" in result.stderr and "Traceback" in result.stderr
    assert not (tmp_path / "out").exists()
