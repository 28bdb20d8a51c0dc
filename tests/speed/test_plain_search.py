"""The plain implementation finds the waves that pbe_fast finds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from led import Led, pictures

from pbe_fast.config import PurifyConfig, WaveConfig
from pbe_fast.leading_waves import leading_waves

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.mark.parametrize(
    ("model", "n"),
    [
        (Led([(-2, 6)]), 200),
        (Led([(5, 1)], target=None, shift=2), 200),
        (Led([(3, 3)], target=None), 200),
        (Led([(-2, 6)]), 60),
    ],
)
def test_the_waves_are_the_same(model: Led, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    plain_search = importlib.import_module("plain_search")
    found = leading_waves(model.eval(), pictures(n), WaveConfig(), generator=torch.Generator().manual_seed(3))
    plain = plain_search.leading_waves_plainly(
        model, pictures(n), PurifyConfig(), torch.Generator().manual_seed(3), torch.device("cpu")
    )
    assert (plain.labels.tolist(), plain.shift, plain.frequencies) == (
        found.labels.tolist(),
        found.shift,
        found.frequencies,
    )
