"""What the dataclasses of options are made of: fields with a help text, and checks of their values."""

from __future__ import annotations

import dataclasses
import numbers
import typing
from dataclasses import field
from typing import Any

from pbe_fast.errors import InputError


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the text that ``--help`` prints for it."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check(condition: bool, name: str, got: object, accepted: str) -> None:
    """Refuses an option's value unless ``condition`` holds.

    Raises:
        InputError: It does not.
    """
    if not condition:
        raise InputError(f"option '{name}'", got=got, accepted=accepted)


def check_types(config: Any) -> None:
    """Refuses a field of another type than it is declared with: ``eps="x"``, ``steps=2.5``, a config of another kind.

    A list where a tuple is declared becomes one.

    Raises:
        InputError: The first such field.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(kind) is tuple:
            part_kind = typing.get_args(kind)[0]
            right = isinstance(value, tuple | list) and all(_is_a(part, part_kind) for part in value)
            accepted = "whole numbers, as a tuple" if part_kind is int else "numbers, as a tuple"
            check(right, name, repr(value), accepted)
            # A list could be changed behind the checks' back, and equals no tuple.
            object.__setattr__(config, name, tuple(value))
        else:
            kinds = typing.get_args(kind) or (kind,)
            accepted = " or ".join(_KINDS.get(k, f"a {k.__name__}") for k in kinds)
            check(any(_is_a(value, k) for k in kinds), name, repr(value), accepted)


_KINDS: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
}
_ABSTRACT = {int: numbers.Integral, float: numbers.Real}


def _is_a(value: object, kind: type) -> bool:
    # True is an int, and nobody means it as one. numpy's numbers will do.
    kind = typing.get_origin(kind) or kind
    return isinstance(value, _ABSTRACT.get(kind, kind)) and (kind is bool or not isinstance(value, bool))


def check_kind(config: object, kind: type[Any]) -> None:
    """Refuses options of another kind than a function takes.

    Raises:
        InputError: A dict, or another config.
    """
    if not isinstance(config, kind):
        hint = f"; a dict of options is {kind.__name__}(**options)" if isinstance(config, dict) else ""
        raise InputError("config", got=type(config).__name__, accepted=f"a {kind.__name__}{hint}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)
