"""A trigger comes back from the folder of its run, with what it has learned, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pbe_fast.errors import InputError
from pbe_fast.runs import load_trigger, save_trigger_weights
from pbe_fast.triggers import Blend, InputAware, Trigger

SHAPE = (1, 8, 8)


def write_report(folder: Path, report: Any) -> None:
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def save(trigger: Trigger, folder: Path) -> list[str]:
    write_report(folder, {"attack": {"trigger": trigger.spec()}})
    return save_trigger_weights(trigger, folder)


def learned() -> InputAware:
    """A trigger whose weights are not those that its spec gives."""
    trigger = InputAware(SHAPE, seed=3, width=8)
    trigger.load_weights(InputAware(SHAPE, seed=4, width=8).weights())
    return trigger


def test_a_trained_trigger_comes_back_with_its_weights(tmp_path: Path) -> None:
    trigger = learned()
    assert save(trigger, tmp_path) == ["trigger.safetensors"]
    again = load_trigger(tmp_path)
    assert again.spec() == trigger.spec()
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.apply(images), trigger.apply(images))
    assert not torch.equal(InputAware(SHAPE, seed=3, width=8).apply(images), trigger.apply(images))


def test_a_trigger_without_weights_writes_none_and_removes_those_of_an_earlier_run(tmp_path: Path) -> None:
    save(learned(), tmp_path)
    trigger = Blend(SHAPE, alpha=0.3, picture="rings")
    assert save(trigger, tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert load_trigger(tmp_path).spec() == trigger.spec()


@pytest.mark.parametrize(
    "report",
    [
        None,
        {},
        {"attack": None},
        {"attack": {"trigger": ["blend"]}},
        {"attack": {"trigger": {"name": "reflection", "image_shape": [1, 8, 8]}}},
        {"attack": {"trigger": {"name": "blend", "image_shape": 8}}},
        {"attack": {"trigger": {"name": "blend"}}},
        {"attack": {"trigger": {"name": "blend", "image_shape": [1, 8]}}},
        {"attack": {"trigger": {"name": "input_aware", "image_shape": [1, 8, 8], "width": "8"}}},
        {"attack": {"trigger": {"name": ["blend"], "image_shape": [1, 8, 8]}}},
    ],
)
def test_reports_without_a_trigger_that_can_be_made(tmp_path: Path, report: Any) -> None:
    if report is not None:
        write_report(tmp_path, report)
    with pytest.raises(InputError, match=r"trigger.*; got "):
        load_trigger(tmp_path)


def test_weights_that_are_missing_damaged_or_another_trigger_s(tmp_path: Path) -> None:
    save(learned(), tmp_path)
    path = tmp_path / "trigger.safetensors"
    save_file(InputAware(SHAPE, width=16).weights(), path)
    with pytest.raises(InputError, match="weights of the input_aware trigger"):
        load_trigger(tmp_path)
    path.write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle under this name is not read as one
    with pytest.raises(InputError, match=r"trigger\.safetensors cannot be read"):
        load_trigger(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"trigger\.safetensors, which is no file"):
        load_trigger(tmp_path)
