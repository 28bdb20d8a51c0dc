"""Flags: those that several commands share, and those made from the fields of the config dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from pbe_fast.cli.shell import Console, Option

F = TypeVar("F", bound=Callable[..., Any])

INPUT, MODEL, OUTPUT, RUN = "Input", "Model", "Output", "Running"
DATA_HELP = (
    "an .npz, a .parquet, a folder with one folder per class, digits:train, digits:test, or a torchvision set such as "
    "cifar10:ROOT:train"
)


def number(text: str | float) -> float:
    """A float, also written as a fraction: 6/255. (Its name is what ``--help`` shows.)"""
    try:
        above, _, below = str(text).partition("/")
        return float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        raise click.BadParameter(f"got {text!r}; accepted: a number, such as 0.05, 1e-3 or 6/255") from None


def numbers(text: str) -> tuple[float, ...]:
    """Floats with commas between them; "none" is no number at all."""
    return () if text == "none" else tuple(number(part) for part in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """Likewise of whole numbers."""
    parts = [] if text == "none" else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"got {text!r}; accepted: whole numbers with commas between them, or none")
    return tuple(int(part) for part in parts)


@dataclass(frozen=True)
class ConfigField:
    """One field of a config dataclass, however deep."""

    name: str
    kind: Any
    default: Any
    help: str
    choices: tuple[str, ...] | None
    section: str


def config_fields(config: Any, section: str, skip: tuple[str, ...] = ()) -> Iterator[ConfigField]:
    """The fields of ``config``, those of the configs in it included; a nested one's help heads its section."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(value):
            what = str(field.metadata["help"])
            title = f"{what[:1].upper()}{what[1:]} ({type(value).__name__.removesuffix('Config')})"
            yield from config_fields(value, title, skip)
        else:
            metadata = field.metadata
            yield ConfigField(field.name, kinds[field.name], value, metadata["help"], metadata.get("choices"), section)


def defaults_of(config: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The value of every field of ``config``, by its name."""
    return {field.name: field.default for field in config_fields(config, "", skip)}


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """``config`` with those of ``values`` in place that are not None.

    Raises:
        InputError: A value that the config refuses.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = with_values(value, values)
        elif values.get(field.name) is not None:
            changed[field.name] = values[field.name]
    return dataclasses.replace(config, **changed)


def config_options(
    config: Any,
    section: str,
    *,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    skip: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """A flag for every field of ``config``; not given they are None, so that a recipe can fill them.

    Args:
        config: The defaults.
        section: Heading of the fields that are not in a nested config.
        others: Other defaults (`defaults_of`) by the name of their recipe or method, to be shown where they differ.
        skip: Fields without a flag.
        aliases: Shorter flags by field.
    """

    def decorate(function: F) -> F:
        for field in reversed(list(config_fields(config, section, skip))):
            shown = _spell_defaults(field, others or {})
            flag = field.name.replace("_", "-")
            names = [alias] if (alias := (aliases or {}).get(field.name)) else []
            names += [f"--{flag}/--no-{flag}" if field.kind is bool else f"--{flag}", field.name]
            function = click.option(
                *names,
                cls=Option,
                section=field.section,
                type=_click_type(field),
                default=None,
                # None is no default: with a recipe another value holds.
                show_default=False,
                help=f"{field.help}  [{shown}]" if field.default is not None else field.help,
            )(function)
        return function

    return decorate


def _click_type(field: ConfigField) -> Any:
    if field.choices:
        return click.Choice(field.choices)
    kind = field.kind
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        return whole_numbers if typing.get_args(kind)[0] is int else numbers
    return {bool: click.BOOL, int: click.INT, float: number, str: click.STRING}[kind]


def _spell_defaults(field: ConfigField, others: Mapping[str, Mapping[str, Any]]) -> str:
    """As in "default: 1; nad, nc: 2": names whose default is the same stand together."""
    names: dict[str, list[str]] = {}
    for name, values in others.items():
        if field.name in values and values[field.name] != field.default:
            names.setdefault(_spell(values[field.name]), []).append(name)
    return "; ".join([f"default: {_spell(field.default)}", *(f"{', '.join(n)}: {v}" for v, n in names.items())])


def _spell(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(_spell, value)) or "none"
    if isinstance(value, float):
        # 1/3 and 6/255 say more than 0.3333333333333333 and 0.023529411764705882.
        fractions = [f"{round(value * part)}/{part}" for part in (3, 255) if round(value * part) / part == value]
        return fractions[0] if fractions and len(repr(value)) > 8 else f"{value:.6g}"
    return str(value)


def option(*names: str, section: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.option` under a heading."""
    return click.option(*names, cls=Option, section=section, **kwargs)


def path_option(*names: str, section: str, **kwargs: Any) -> Callable[[F], F]:
    """An option that takes a path, which need not exist: the readers say what is wrong with it."""
    return option(*names, section=section, type=click.Path(path_type=Path), **kwargs)


def model_options(function: F) -> F:
    """--arch, --width, --mean and --std, for weights without a config.json."""
    for add in (
        option("--std", section=MODEL, type=numbers, help="their standard deviation per channel"),
        option(
            "--mean",
            section=MODEL,
            type=numbers,
            help="mean per channel of the normalised images that the network takes",
        ),
        option("--width", section=MODEL, type=click.IntRange(1), metavar="N", help="channels of its first stage"),
        option(
            "--arch",
            section=MODEL,
            help="network of weights without a config.json: preact_resnet18, resnet18, small_cnn, torchvision:NAME, "
            "or module:function of your own",
        ),
    ):
        function = add(function)
    return function


def image_size_option(function: F) -> F:
    """--image-size, for every set that the command reads."""
    return option(
        "--image-size",
        section=INPUT,
        type=click.IntRange(1),
        metavar="PIXELS",
        help="resize all images that are read to this height and width",
    )(function)


def size_given(image_size: int | None) -> dict[str, tuple[int, int]]:
    """--image-size as `pbe_fast.runs.require_size` takes it; nothing where it was not given."""
    return {} if image_size is None else {"the images (--image-size)": (image_size, image_size)}


def device_options(precision: str) -> Callable[[F], F]:
    """--device and --precision."""

    def decorate(function: F) -> F:
        function = option(
            "--precision",
            section=RUN,
            type=click.Choice(("auto", "fp32", "bf16")),
            default=precision,
            show_default=True,
            help="of the matrix products; auto takes bf16 where it is faster",
        )(function)
        return option("--device", section=RUN, default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")(
            function
        )

    return decorate


# What `pbe_fast.engine.seeding` takes.
SEED = click.IntRange(0, 2**63 - 1)
seed_option = option(
    "--seed",
    section=RUN,
    type=SEED,
    metavar="N",
    default=0,
    show_default=True,
    help="fixes every random choice",
)
force_option = option("--force", section=OUTPUT, is_flag=True, help="replace what an earlier run left there")


def console_options(function: F) -> F:
    """--quiet, --json and --debug; the command gets a ``console``."""

    def set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta["debug"] = value

    @option("--quiet", "-q", section=RUN, is_flag=True, help="no notes and no progress bars on stderr")
    @option("--json", "as_json", section=RUN, is_flag=True, help="print the report as JSON; stdout holds nothing else")
    @option(
        "--debug",
        section=RUN,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=set_debug,
        help="show the traceback of an error",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, quiet: bool, as_json: bool, **kwargs: Any) -> Any:
        console = Console(as_json=as_json, quiet=quiet)
        with console.notes_for_warnings():
            return function(*args, console=console, **kwargs)

    return typing.cast(F, wrapped)
