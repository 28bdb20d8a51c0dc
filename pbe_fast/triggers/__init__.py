"""Backdoor triggers, one attack per file."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from pbe_fast.errors import InputError
from pbe_fast.triggers.badnets import BadNets
from pbe_fast.triggers.base import ImageShape, Trigger
from pbe_fast.triggers.blend import Blend
from pbe_fast.triggers.input_aware import InputAware
from pbe_fast.triggers.sig import SIG
from pbe_fast.triggers.wanet import WaNet

TRIGGERS: dict[str, type[Trigger]] = {kind.name: kind for kind in (BadNets, Blend, SIG, WaNet, InputAware)}

__all__ = ["SIG", "TRIGGERS", "BadNets", "Blend", "ImageShape", "InputAware", "Trigger", "WaNet", "make_trigger"]


def make_trigger(name: str, image_shape: ImageShape, **hyperparameters: Any) -> Trigger:
    """The trigger called ``name`` for images of ``image_shape``; the rest goes to its constructor.

    Raises:
        InputError: An unknown name, or a hyperparameter that this trigger does not have or that is of another type.
    """
    if name not in TRIGGERS:
        raise InputError("unknown trigger", got=repr(name), accepted=", ".join(TRIGGERS))
    known = _hyperparameters(name)
    for key, value in hyperparameters.items():
        if key not in known:
            raise InputError(f"hyperparameters of the {name} trigger", got=repr(key), accepted=", ".join(known))
        if key != "seed" and not _fits(value, known[key]):
            accepted = " or ".join(_KINDS[kind] for kind in known[key])
            raise InputError(f"{key} of the {name} trigger", got=repr(value), accepted=accepted)
    return TRIGGERS[name](image_shape, **hyperparameters)


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text", type(None): "None"}


def _hyperparameters(name: str) -> dict[str, tuple[type, ...]]:
    """The keywords of a trigger's constructor, and the types that each of them takes."""
    hints = typing.get_type_hints(TRIGGERS[name].__init__)
    parameters = inspect.signature(TRIGGERS[name]).parameters.values()
    return {p.name: typing.get_args(hints[p.name]) or (hints[p.name],) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))
