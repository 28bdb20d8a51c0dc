"""What a run does where a slow wave leads the infected model to a label, or from each label to another."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from quarters import infect, quarters, run, watch
from torch import Tensor

from pbe_fast.attack import InfectedModel
from pbe_fast.config import WaveConfig
from pbe_fast.extra_set import next_extra_set
from pbe_fast.finetune import FineTuner
from pbe_fast.leading_waves import LeadingWaves
from pbe_fast.steadiness import fragility


@pytest.fixture(scope="module")
def of_eight() -> InfectedModel:
    return infect(classes=8)


def led(labels: list[int], shift: int | None = None) -> LeadingWaves:
    return LeadingWaves(torch.tensor([k in labels for k in range(8)]), shift, ((-1, 2),))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[WaveConfig, ...]]:
    """The waves among the turns of step 1b, by round."""
    seen: list[tuple[WaveConfig, ...]] = []
    tune = FineTuner.run

    def watched(self: FineTuner, *arguments: Any, **keywords: Any) -> float | None:
        if keywords.get("attack"):
            seen.append(tuple(attack for attack in keywords["attack"] if isinstance(attack, WaveConfig)))
        return tune(self, *arguments, **keywords)

    monkeypatch.setattr(FineTuner, "run", watched)
    return seen


def test_the_label_that_a_wave_leads_to_is_left_out_and_ranks_by_all_rounds(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, turns: list[tuple[WaveConfig, ...]]
) -> None:
    asked: list[list[int]] = []

    def chosen(*arguments: Any, **keywords: Any) -> Tensor:
        asked.append(keywords["changed"].nonzero()[:, 0].tolist())
        return next_extra_set(*arguments, **keywords)

    # A label that attracts as well is left out, but forgets earlier rounds.
    seen = watch(monkeypatch, of_eight, attracting=[1], waves=led([6]))
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    result = run(of_eight.model, of_eight.train_data, initial="steady")
    assert seen.left_out == [[1, 6]] and seen.fragile == [False] and seen.taught == ["right", None, None]
    assert all(entry["labels_apart"] == [1, 6] for entry in result.history)
    assert asked == [[6], [6]]
    assert result.history[0]["wave"] == {"down": -1, "across": 2, "label": 6} and "wave" not in result.history[1]
    assert result.seconds["leading waves"] > 0
    # Step 1b looks where the trigger is, in every round.
    near = ((-1, 2),)
    assert turns == [(WaveConfig(amplitude=0.2, near=near), WaveConfig(amplitude=0.2, near=near))] * 3


def test_a_shift_leaves_no_label_out_and_makes_images_fragile_that_need_the_wave(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, turns: list[tuple[WaveConfig, ...]]
) -> None:
    without: list[Any] = []

    def watched(*arguments: Any, **keywords: Any) -> Tensor:
        without.append(keywords["waves"])
        return fragility(*arguments, **keywords)

    seen = watch(monkeypatch, of_eight, attracting=[1], waves=led([], shift=1))
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "fragility", watched)
    result = run(of_eight.model, of_eight.train_data, initial="steady")
    assert seen.left_out == [[]] and seen.fragile == [True] and seen.steady == [True, True]
    assert seen.taught == [None] * 3
    assert without == [((-1, 2),)]
    assert result.history[0]["wave"] == {"down": -1, "across": 2, "shift": 1}
    assert "attracting labels" not in result.seconds and "labels left out: adversarial" not in result.seconds
    assert all(wave.near == ((-1, 2),) for turn in turns for wave in turn) and len(turns) == 3


def test_with_a_clean_set_it_is_looked_for_there(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, turns: list[tuple[WaveConfig, ...]]
) -> None:
    clean = quarters(48, seed=1, classes=8)
    seen = watch(monkeypatch, of_eight, attracting=[], waves=led([3]), changed=lambda distances: torch.arange(8) == 5)
    looked: list[int] = []

    def look(model: Any, data: Any, *arguments: Any, **keywords: Any) -> LeadingWaves:
        looked.append(len(data))
        return led([3])

    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "leading_waves", look)
    result = run(of_eight.model, of_eight.train_data, clean, refining_fractions=(0.5,))
    assert looked == [48] and seen.taught == ["all", None]
    assert [entry["labels_apart"] for entry in result.history] == [[3, 5]] * 2
    assert all(wave.near == ((-1, 2),) for turn in turns for wave in turn) and len(turns) == 2
    alone = run(of_eight.model, None, clean)
    assert alone.history[0]["wave"] == {"down": -1, "across": 2, "label": 3}


def test_without_turns_of_waves_none_is_looked_for(of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, of_eight, attracting=[], waves=led([3]))
    result = run(of_eight.model, of_eight.train_data, wave_amplitudes=())
    assert "leading waves" not in result.seconds and "wave" not in result.history[0]
    assert all(entry["labels_apart"] == [] for entry in result.history)
