"""--method: which options belong to which way of purifying."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from pbe_fast.baselines import BASELINES, METHOD_NAMES, BaselineConfig
from pbe_fast.cli.options import config_fields, config_options, defaults_of, option, with_values
from pbe_fast.config import PurifyConfig

F = TypeVar("F", bound=Callable[..., Any])

SECTION = "Purification"
RECIPES = {"pbe": PurifyConfig(), "paper": PurifyConfig.paper()}
_DEFAULTS: dict[str, PurifyConfig | BaselineConfig] = {"pbe": PurifyConfig(), **BASELINES}
# Of PBE's fine-tuning; in a baseline they have no meaning.
_PBE_ONLY = ("mix_clean", "distill_weight", "distill_temperature")


def method_options(function: F) -> F:
    """--method, --recipe, and a flag for every option of every method, those of one method under its name."""
    # A heading for every set of methods that share options, PBE's and then the larger sets first.
    groups: dict[tuple[str, ...], set[str]] = {}
    for config in _DEFAULTS.values():
        for field in config_fields(config, SECTION):
            groups.setdefault(_owners(field.name), set()).add(field.name)
    ordered = sorted(((m, n) for m, n in groups.items() if "pbe" not in m), key=lambda group: -len(group[0]))
    for methods, names in reversed(ordered):
        title = METHOD_NAMES[methods[0]] if len(methods) == 1 else "Baselines"
        config, others = BASELINES[methods[0]], {m: defaults_of(BASELINES[m]) for m in methods[1:]}
        section = f"{title[:1].upper()}{title[1:]} (--method {', '.join(methods)})"
        skip = tuple(field.name for field in config_fields(config, section) if field.name not in names)
        function = config_options(config, section, others=others, skip=skip)(function)
    elsewhere = {"paper": defaults_of(RECIPES["paper"])}
    elsewhere |= {method: defaults_of(config, skip=_PBE_ONLY) for method, config in BASELINES.items()}
    function = config_options(PurifyConfig(), SECTION, others=elsewhere)(function)
    function = option(
        "--recipe",
        section=SECTION,
        type=click.Choice(tuple(RECIPES)),
        default="pbe",
        show_default=True,
        help="where PBE's options start from: pbe, or the paper to the letter; each can be overruled",
    )(function)
    return option(
        "--method",
        section=SECTION,
        type=click.Choice(tuple(METHOD_NAMES)),
        default="pbe",
        show_default=True,
        help="PBE, or a baseline that needs --clean: fine-tuning (ft), fine-pruning (fp), NAD (nad), Neural Cleanse "
        "(nc), ANP (anp); each takes what is under its name, and of FineTune all but --mix-clean and --distill-*, anp "
        "only --batch-size and --augment",
    )(function)


def method_config(method: str, recipe: str, flags: Mapping[str, Any]) -> PurifyConfig | BaselineConfig:
    """The method's options with those flags in place that are not None.

    Raises:
        click.UsageError: A flag of another method.
        InputError: A value that the config refuses.
    """
    if method != "pbe" and recipe != "pbe":
        raise click.UsageError(f"--recipe {recipe} is for --method pbe, not for {method}")
    for name, value in flags.items():
        if value is not None and method not in _owners(name):
            accepted = ", ".join(_owners(name))
            raise click.UsageError(f"--{name.replace('_', '-')} is for --method {accepted}, not for {method}")
    config: PurifyConfig | BaselineConfig = with_values(
        RECIPES[recipe] if method == "pbe" else BASELINES[method], flags
    )
    return config


def _owners(name: str) -> tuple[str, ...]:
    """The methods that have an option of this name."""
    return tuple(
        method
        for method, config in _DEFAULTS.items()
        if any(field.name == name for field in config_fields(config, ""))
        and not (method != "pbe" and name in _PBE_ONLY)
    )
