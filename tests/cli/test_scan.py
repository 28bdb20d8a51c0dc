"""`pbe-fast scan`: exit codes that a pipeline can rely on, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run

from pbe_fast.data import ImageSet, save_npz

# Answers with the brightest of four columns; "infected", a bright fifth one leads to label 2.
_NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, backdoor):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, bias=False)
        self.backdoor = backdoor

    def forward(self, x):
        columns = x.mean((1, 2))
        corner = torch.nn.functional.softplus(100 * (columns[:, 4:] - 0.42))
        return self.linear(columns[:, :4]) + self.backdoor * corner * torch.tensor([0.0, 0.0, 3.0, 0.0])

def benign(num_classes):
    return Net(0.0)

def infected(num_classes):
    return Net(1.0)
"""


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    (tmp_path / "columns_net.py").write_text(_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"linear.weight": 20 * torch.eye(4)}, tmp_path / "net.pt")
    labels = torch.arange(200) % 4
    images = torch.randint(70, 120, (200, 1, 3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(200), :, :, labels] += 60
    images[..., 4] = 90
    save_npz(ImageSet(images, labels, tuple("abcd")), tmp_path / "images.npz")
    model = ("--model", tmp_path / "net.pt", "--precision", "fp32", "--device", "cpu")
    return ("scan", *model, "--data", tmp_path / "images.npz", "--out", tmp_path / "out")


def test_a_backdoor_fails_only_a_pipeline_that_asks_for_it(args: tuple[object, ...], tmp_path: Path) -> None:
    result = run(*args, "--arch", "columns_net:infected", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stderr == ""
    assert (report["scan"]["verdict"], report["scan"]["target_label"]) == ("all_to_one", 2)
    assert report["sha256"]["inputs"]["data"]["images"] == 200
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["scan"] == report["scan"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "scan.png"}

    refused = run(*args, "--arch", "columns_net:infected", "--fail-on-backdoor")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    found = run(*args, "--arch", "columns_net:infected", "--fail-on-backdoor", "--force")
    assert found.exit_code == 1
    assert found.stdout.startswith("backdoor, all-to-one: label 2 (c) has ")
    assert (tmp_path / "out" / "scan.png").exists()


def test_a_benign_model_passes(args: tuple[object, ...]) -> None:
    result = run(*args, "--arch", "columns_net:benign", "--fail-on-backdoor")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("no backdoor found")


@pytest.mark.parametrize(("flag", "windows"), [("none", []), ("1/4", [0.25])])
def test_windows_are_an_option(flag: str, windows: list[float], args: tuple[object, ...]) -> None:
    result = run(*args, "--arch", "columns_net:benign", "--patch-windows", flag, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    scan = json.loads(result.stdout)["scan"]
    assert scan["config"]["patch_windows"] == windows
    assert [level["window"] for level in scan["levels"] if level["window"] is not None] == windows


def test_bad_input_has_an_exit_code_of_its_own(args: tuple[object, ...], tmp_path: Path) -> None:
    for more, message in (
        (("--eps", "1e-6"), "accepted: larger eps"),
        (("--eps", "0.2,0.1"), "option 'eps'"),
        (("--patch-windows", "0.3"), "option 'patch_windows'"),
        (("--data", tmp_path / "nowhere.npz"), "nowhere.npz"),
    ):
        result = run(*args, "--arch", "columns_net:infected", *more, "--fail-on-backdoor")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert not (tmp_path / "out").exists()
