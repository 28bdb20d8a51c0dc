"""The options of the baselines; `test_config` has the same for the others."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pbe_fast.baselines import BASELINES, METHOD_NAMES, ANPConfig, FinePruningConfig, NADConfig, NeuralCleanseConfig
from pbe_fast.errors import InputError
from pbe_fast.options import to_dict

WRONG: list[tuple[Any, dict[str, Any]]] = [
    *((type(BASELINES[method]), {"epochs": 0}) for method in ("ft", "fp", "nad", "nc")),
    *((type(BASELINES[method]), {"min_updates": -1}) for method in ("ft", "fp", "nad", "nc")),
    *((kind, {"held_out": value}) for kind in (FinePruningConfig, ANPConfig) for value in (0.0, 1.0)),
    *((kind, {"max_drop": value}) for kind in (FinePruningConfig, ANPConfig) for value in (-0.1, 1.0)),
    (FinePruningConfig, {"prune_step": 0.0}),
    (NADConfig, {"teacher_epochs": 0}),
    (NADConfig, {"betas": ()}),
    (NADConfig, {"betas": (1.0, -1.0)}),
    (NADConfig, {"attention_power": 0.0}),
    (NeuralCleanseConfig, {"trigger_rounds": 0}),
    (NeuralCleanseConfig, {"updates_per_round": 0}),
    (NeuralCleanseConfig, {"trigger_batch": 0}),
    (NeuralCleanseConfig, {"trigger_lr": 0.0}),
    (NeuralCleanseConfig, {"trigger_success": 1.1}),
    (NeuralCleanseConfig, {"cost": 0.0}),
    (NeuralCleanseConfig, {"cost_up": 1.0}),
    (NeuralCleanseConfig, {"cost_down": 0.5}),
    (NeuralCleanseConfig, {"patience": 0}),
    (NeuralCleanseConfig, {"outlier_index": 0.0}),
    (NeuralCleanseConfig, {"stamped": 0.0}),
    (ANPConfig, {"batch_size": 1}),
    (ANPConfig, {"augment": "flip"}),
    (ANPConfig, {"iterations": 0}),
    (ANPConfig, {"mask_lr": 0.0}),
    (ANPConfig, {"perturbation": -0.1}),
    (ANPConfig, {"perturbation_steps": 0}),
    (ANPConfig, {"clean_weight": 1.1}),
    (ANPConfig, {"max_threshold": 1.0}),
    (ANPConfig, {"threshold_step": 0.0}),
]


@pytest.mark.parametrize(("kind", "option"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_named_with_what_is_accepted(kind: Any, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InputError) as error:
        kind(**option)
    assert f"option '{name}'; got {option[name]}" in str(error.value)
    assert "accepted: " in str(error.value)


@pytest.mark.parametrize("method", BASELINES)
def test_the_defaults_cannot_be_changed_fit_into_json_and_have_help(method: str) -> None:
    config = BASELINES[method]
    fields = dataclasses.fields(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, fields[0].name, None)
    assert list(json.loads(json.dumps(to_dict(config)))) == [f.name for f in fields]
    for field in fields:
        assert field.metadata["help"], field.name
        for choice in field.metadata["choices"] or ():
            assert getattr(dataclasses.replace(config, **{field.name: choice}), field.name) == choice
    assert METHOD_NAMES[method]
