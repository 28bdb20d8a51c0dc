from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from pbe_fast.baselines import NADConfig
from pbe_fast.config import (
    AttackConfig,
    FineTuneConfig,
    InputAwareConfig,
    PGDConfig,
    PurifyConfig,
    ScanConfig,
    WaveConfig,
)
from pbe_fast.errors import InputError
from pbe_fast.options import to_dict
from pbe_fast.triggers import TRIGGERS

CONFIGS = (PGDConfig, FineTuneConfig, PurifyConfig, InputAwareConfig, AttackConfig)

WRONG: list[tuple[Any, dict[str, Any]]] = [
    (PGDConfig, {"norm": "l1"}),
    (PGDConfig, {"eps": 0.0}),
    (PGDConfig, {"eps": math.nan}),
    (PGDConfig, {"eps": math.inf}),
    (PGDConfig, {"eps": 8}),
    (PurifyConfig, {"eps_factors": (1.0, 30.0)}),
    (ScanConfig, {"eps": ()}),
    (PGDConfig, {"alpha": -0.1}),
    (PGDConfig, {"steps": 0}),
    (PGDConfig, {"restarts": 0}),
    (PGDConfig, {"restarts": 257}),
    (PGDConfig, {"restarts": 2}),
    (PGDConfig, {"compile": "never"}),
    (FineTuneConfig, {"lr": 0.0}),
    (PGDConfig, {"window": 0.0}),
    (PGDConfig, {"window": 1.1}),
    (PGDConfig, {"grid": 0}),
    (FineTuneConfig, {"lr": math.nan}),
    (FineTuneConfig, {"batch_size": 1}),
    (FineTuneConfig, {"momentum": 1.0}),
    (FineTuneConfig, {"weight_decay": -1e-4}),
    (FineTuneConfig, {"warmup": 1.5}),
    (FineTuneConfig, {"augment": "flip"}),
    (FineTuneConfig, {"distill_weight": -1.0}),
    (FineTuneConfig, {"distill_temperature": 0.0}),
    (PurifyConfig, {"adversarial_steps": -1}),
    (PurifyConfig, {"clean_steps": -1}),
    (PurifyConfig, {"clean_epochs": -1}),
    (PurifyConfig, {"eps_factors": ()}),
    (PurifyConfig, {"eps_factors": (1.0, 0.0)}),
    (PurifyConfig, {"patch_windows": (0.0,)}),
    (PurifyConfig, {"patch_windows": (0.25, 1.5)}),
    (PurifyConfig, {"smooth_grids": (8, 0)}),
    (PurifyConfig, {"smooth_eps": 0.0}),
    (PurifyConfig, {"smooth_eps": 12.0}),
    (PurifyConfig, {"wave_amplitudes": (0.1, 0.0)}),
    (PurifyConfig, {"wave_amplitudes": (math.inf,)}),
    (WaveConfig, {"amplitude": 0.0}),
    (WaveConfig, {"max_cycles": 0.0}),
    (PurifyConfig, {"fractions": ()}),
    (PurifyConfig, {"fractions": (0.1, 0.0)}),
    (PurifyConfig, {"fractions": (0.1, 1.1)}),
    (PurifyConfig, {"initial": "easy"}),
    (PurifyConfig, {"hard_quantile": 0.0}),
    (InputAwareConfig, {"mask_share": 0.0}),
    (InputAwareConfig, {"mask_density": 1.0}),
    (InputAwareConfig, {"mask_lr": math.nan}),
    (InputAwareConfig, {"generator_lr": -0.1}),
    (InputAwareConfig, {"lambda_div": -1.0}),
    (InputAwareConfig, {"lambda_norm": math.inf}),
    (AttackConfig, {"setting": "one_to_one"}),
    (AttackConfig, {"poison_rate": 0.0}),
    (AttackConfig, {"poison_rate": 1.0}),
    (AttackConfig, {"epochs": 0}),
]


@pytest.mark.parametrize(("kind", "option"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_named_with_what_is_accepted(kind: Any, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InputError) as error:
        kind(**option)
    text = str(error.value)
    assert f"option '{name}'; got {option[name]}" in text
    assert "accepted: " in text


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_defaults_work_cannot_be_changed_and_fit_into_json(kind: Any) -> None:
    config = kind()
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)
    values = json.loads(json.dumps(to_dict(config)))
    assert list(values) == [f.name for f in dataclasses.fields(config)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_has_a_help_text_and_its_choices_are_accepted(kind: Any) -> None:
    for option in dataclasses.fields(kind):
        assert option.metadata["help"], option.name
        for choice in option.metadata["choices"] or ():
            assert getattr(kind(**{option.name: choice}), option.name) == choice


def test_the_attacks_on_offer_are_the_triggers_there_are() -> None:
    (attack,) = (f for f in dataclasses.fields(AttackConfig) if f.name == "attack")
    assert set(attack.metadata["choices"]) == set(TRIGGERS)


def test_step_size_is_a_quarter_of_eps_unless_given() -> None:
    assert PGDConfig(eps=0.4).step_size == pytest.approx(0.1)
    assert PGDConfig(eps=0.4, alpha=0.3).step_size == 0.3


def test_the_paper_s_own_options() -> None:
    paper = PurifyConfig.paper()
    assert not paper.finetune.mix_clean
    assert paper.finetune.distill_weight == 0
    assert paper.initial == "random"


@pytest.mark.parametrize("option", [{"window": 0.5}, {"random_start": True}, {"norm": "l2"}])
def test_a_grid_stands_by_itself(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="option 'grid'; got 4; accepted: with norm linf"):
        PGDConfig(grid=4, **option)
    with_grid = PurifyConfig(pgd=PGDConfig(grid=4), patch_windows=(0.25,))
    assert [(attack.grid, attack.window) for attack in with_grid.patch_attacks] == [(None, 0.25)]


def test_step_1b_takes_turns_between_sizes_of_eps_and_the_paper_has_one() -> None:
    config = PurifyConfig(pgd=PGDConfig(eps=0.08, alpha=0.01), eps_factors=(1.0, 0.25))
    turns = config.attacks[:2]
    assert all(isinstance(turn, PGDConfig) and turn.window is None for turn in turns)
    assert [(turn.eps, turn.step_size) for turn in turns] == [(0.08, 0.01), (0.02, 0.0025)]
    (only,) = PurifyConfig.paper().attacks
    assert isinstance(only, PGDConfig)
    assert only.eps == PGDConfig().eps and only.window is None
    assert PurifyConfig.paper().adversarial_steps == 100


def test_and_between_windows_that_are_changed_at_will_whatever_the_ball_is_and_waves_and_grids() -> None:
    config = PurifyConfig(
        pgd=PGDConfig(norm="l2", eps=2.0, steps=7, random_start=True, restarts=2),
        eps_factors=(1.0,),
        patch_windows=(0.5, 0.2),
        wave_amplitudes=(0.3, 0.1),
        smooth_grids=(6, 3),
        smooth_eps=0.2,
    )
    whole, *others = config.attacks
    assert isinstance(whole, PGDConfig) and (whole.norm, whole.eps, whole.window) == ("l2", 2.0, None)
    waves = (WaveConfig(amplitude=0.3), WaveConfig(amplitude=0.1))
    smooth = tuple(PGDConfig(eps=0.2, alpha=0.05, steps=7, grid=grid) for grid in (6, 3))
    assert tuple(others) == (*config.patch_attacks, *waves, *smooth)
    assert [a.window for a in config.patch_attacks] == [0.5, 0.2]
    # Whatever the number of steps, a pixel can go from 0 to 1.
    assert all(
        a.steps * a.step_size >= 1 for s in (1, 3, 9) for a in PurifyConfig(pgd=PGDConfig(steps=s)).patch_attacks
    )
    assert {(a.norm, a.eps, a.steps) for a in config.patch_attacks} == {("linf", 1.0, 7)}


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        (PGDConfig, {"eps": "x"}, "option 'eps'; got 'x'; accepted: a number"),
        (PGDConfig, {"eps": True}, "option 'eps'; got True; accepted: a number"),
        (PGDConfig, {"alpha": "x"}, "option 'alpha'; got 'x'; accepted: a number or None"),
        (PGDConfig, {"steps": 2.5}, "option 'steps'; got 2.5; accepted: a whole number"),
        (PGDConfig, {"random_start": "yes"}, "option 'random_start'; got 'yes'; accepted: True or False"),
        (PGDConfig, {"norm": 2}, "option 'norm'; got 2; accepted: text"),
        (PurifyConfig, {"pgd": {"eps": 0.1}}, "option 'pgd'; got .*; accepted: a PGDConfig"),
        (PurifyConfig, {"fractions": 0.1}, "option 'fractions'; got 0.1; accepted: numbers, as a tuple"),
        (PurifyConfig, {"fractions": ("x",)}, "option 'fractions'; got .*; accepted: numbers, as a tuple"),
        (
            PurifyConfig,
            {"smooth_grids": (8, 2.5)},
            "option 'smooth_grids'; got .*; accepted: whole numbers, as a tuple",
        ),
        (NADConfig, {"epochs": "many"}, "option 'epochs'; got 'many'; accepted: a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named_too(kind: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**option)


def test_numbers_of_numpy_are_numbers() -> None:
    assert PGDConfig(eps=np.float32(0.1), steps=np.int64(3)).steps == 3


def test_an_eps_in_levels_is_told_what_to_write() -> None:
    for make in (lambda: PGDConfig(eps=8), lambda: ScanConfig(eps=(1 / 255, 8))):
        with pytest.raises(
            InputError, match=r"option 'eps'; got 8; .*pixel units of \[0, 1\]; 8 levels of 255 are 8/255"
        ):
            make()
    # What an l2 ball may hold depends on the images.
    assert PGDConfig(norm="l2", eps=8).eps == ScanConfig(norm="l2", eps=(8,)).eps[0] == 8
    assert PurifyConfig(pgd=PGDConfig(norm="l2", eps=0.5), eps_factors=(4.0,)).attacks[0].eps == 2


def test_a_list_becomes_a_tuple() -> None:
    fractions: Any = [0.1, 0.3]
    config = PurifyConfig(fractions=fractions, eps_factors=fractions)
    fractions.append(7.0)
    assert config == PurifyConfig(fractions=(0.1, 0.3), eps_factors=(0.1, 0.3))
    assert hash(config.fractions)
