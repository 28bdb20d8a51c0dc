"""An infected model and a purified one, as the command line writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run


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
