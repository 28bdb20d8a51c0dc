"""A run draws otherwise than a poisoning with the same seed, whose permutation it would repeat."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from led import Led, pictures
from quarters import infect, run

import pbe_fast
from pbe_fast.config import ScanConfig


def plainly_seeded(generator: torch.Generator, seed: int) -> bool:
    return generator.initial_seed() == seed


def test_no_run_draws_what_a_poisoning_with_its_seed_has_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Generator] = []

    def watch(module: str, name: str) -> None:
        place = importlib.import_module(module)
        function = getattr(place, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            everything = (*arguments, *keywords.values())
            seen.extend(value for value in everything if isinstance(value, torch.Generator))
            return function(*arguments, **keywords)

        monkeypatch.setattr(place, name, watched)

    watch("pbe_fast.steps", "resolve_augment")
    watch("pbe_fast.scan", "_sample")
    infected = infect()
    run(infected.model, infected.train_data, seed=3)
    options: dict[str, Any] = {"seed": 3, "device": "cpu", "precision": "fp32", "progress": False}
    pbe_fast.scan(Led([(0, 6)]), pictures(), config=ScanConfig(steps=2, patch_windows=(), waves=False), **options)
    assert len(seen) == 2 and not any(plainly_seeded(generator, 3) for generator in seen)
