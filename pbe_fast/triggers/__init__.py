"""Backdoor triggers, one attack per file."""

from __future__ import annotations

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
        InputError: An unknown name, or a hyperparameter that this trigger does not have.
    """
    if name not in TRIGGERS:
        raise InputError("unknown trigger", got=repr(name), accepted=", ".join(TRIGGERS))
    try:
        return TRIGGERS[name](image_shape, **hyperparameters)
    except TypeError as error:
        raise InputError(f"hyperparameters of the {name} trigger", got=str(error)) from error
