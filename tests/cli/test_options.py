"""Flags come from the fields of the configs, and go back into them."""

from __future__ import annotations

import dataclasses

import click
import pytest
from click.testing import CliRunner

from pbe_fast.baselines import BASELINES
from pbe_fast.cli import main
from pbe_fast.cli.methods import method_config
from pbe_fast.cli.options import _spell, config_fields, number, numbers, whole_numbers, with_values
from pbe_fast.config import AttackConfig, PurifyConfig
from pbe_fast.errors import InputError

PURIFY, ATTACK = main.commands["purify"], main.commands["attack"]


def test_every_option_of_a_purification_has_a_flag() -> None:
    flags = {param.name for param in PURIFY.params}
    nested = [PurifyConfig(), PurifyConfig().pgd, PurifyConfig().finetune]
    fields = {f.name for config in nested for f in dataclasses.fields(config)} - {"pgd", "finetune"}
    assert fields <= flags
    assert {f.name for f in config_fields(PurifyConfig(), "")} == fields


def test_every_option_of_a_baseline_has_a_flag_under_the_methods_that_take_it() -> None:
    flags = {param.name for param in PURIFY.params}
    sections = {param.name: getattr(param, "section", "") for param in PURIFY.params}
    for method, config in BASELINES.items():
        names = {field.name for field in config_fields(config, "")}
        assert names <= flags
        for name in names - {f.name for f in config_fields(PurifyConfig(), "")}:
            assert method in sections[name].partition("(--method ")[2].rstrip(")").split(", "), name
    text = " ".join(CliRunner().invoke(main, ["purify", "--help"]).stdout.split())
    assert "[default: 0.02; ft, fp, nad, nc: 0.01]" in text
    assert "[default: 100; nad: 10]" in text
    # Not those of a method that refuses the flag.
    assert "beside the adversarial ones in every batch [default: on; paper: off]" in text
    assert "Neural Cleanse (--method nc):" in text


def test_the_options_of_a_method_and_no_others() -> None:
    assert method_config("nad", "pbe", {}) == BASELINES["nad"]
    assert method_config("pbe", "paper", {}) == PurifyConfig.paper()
    config = method_config("nad", "pbe", {"betas": (1.0, 2.0), "lr": 0.5, "eps": None})
    assert (config.betas, config.finetune.lr, config.finetune.distill_weight) == ((1.0, 2.0), 0.5, 0.0)
    for method, flags, message in (
        ("nad", {"eps": 0.1}, "--eps is for --method pbe, not for nad"),
        ("pbe", {"betas": (1.0,)}, "--betas is for --method nad, not for pbe"),
        ("anp", {"max_drop": 0.1, "prune_step": 0.1}, "--prune-step is for --method fp, not for anp"),
        ("ft", {"distill_weight": 1.0}, "--distill-weight is for --method pbe, not for ft"),
        ("anp", {"lr": 0.1}, "--lr is for --method pbe, ft, fp, nad, nc, not for anp"),
    ):
        with pytest.raises(click.UsageError, match=message):
            method_config(method, "pbe", flags)
    with pytest.raises(click.UsageError, match="--recipe paper is for --method pbe, not for nc"):
        method_config("nc", "paper", {})


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_no_two_options_share_a_name(command: click.Command) -> None:
    names = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
    assert len(names) == len(set(names))
    assert len({param.name for param in command.params}) == len(command.params)


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_help_has_an_example_that_parses(command: click.Command) -> None:
    text = CliRunner().invoke(main, [str(command.name), "--help"]).stdout
    example = text.partition("Example:\n")[2].replace("\\\n", " ")
    lines = [line.split() for line in example.splitlines() if line.strip()]
    assert lines
    for words in lines:
        assert words[:2] == ["pbe-fast", command.name]
        command.make_context("pbe-fast", words[2:])


def test_help_shows_every_default_and_where_the_paper_differs() -> None:
    text = " ".join(CliRunner().invoke(main, ["purify", "--help"]).stdout.split())
    defaults = PurifyConfig()
    assert f"[default: {defaults.adversarial_steps}" in text
    assert f"[default: {','.join(f'{f:g}' for f in defaults.fractions)}]" in text
    assert "[default: steady; paper: random]" in text


@pytest.mark.parametrize("config", [PurifyConfig(), PurifyConfig.paper(), AttackConfig()])
def test_values_of_flags_reach_the_field(config: object) -> None:
    assert with_values(config, {}) == config
    assert with_values(config, {field.name: None for field in config_fields(config, "")}) == config
    for field in config_fields(config, ""):
        value = field.default if field.default is not None else {"grid": 3}.get(field.name, 0.5)
        changed = with_values(config, {field.name: value})
        assert {f.name: f.default for f in config_fields(changed, "")}[field.name] == value
    assert with_values(config, {"lr": 0.123}) != config


def test_a_recipe_is_where_flags_start_from() -> None:
    config = with_values(PurifyConfig.paper(), {"distill_weight": 0.5, "steps": 3})
    assert (config.finetune.distill_weight, config.pgd.steps, config.initial) == (0.5, 3, "random")
    with pytest.raises(InputError, match="option 'steps'; got 0"):
        with_values(PurifyConfig(), {"steps": 0})


def test_numbers_as_people_write_them() -> None:
    assert (number("6/255"), number("1e-3"), number("-2")) == (6 / 255, 1e-3, -2.0)
    assert numbers("0.1,1/2") == (0.1, 0.5)
    assert (whole_numbers("8,4"), whole_numbers("6"), whole_numbers("none")) == ((8, 4), (6,), ())
    for text in ("", "8.0", "8,", "-8", "a"):
        with pytest.raises(click.BadParameter, match="accepted: whole numbers"):
            whole_numbers(text)
    for text in ("", "a", "1/", "1/0", "1/2/3"):
        with pytest.raises(click.BadParameter, match="accepted: a number"):
            number(text if text != "1/" else "1/ ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1 / 3, "1/3"), (2 / 3, "2/3"), (6 / 255, "6/255"), (17 / 255, "17/255"), (0.2, "0.2"), (1.0, "1")],
)
def test_defaults_are_spelled_as_one_would_type_them(value: float, text: str) -> None:
    assert _spell(value) == text
    assert number(text) == value
