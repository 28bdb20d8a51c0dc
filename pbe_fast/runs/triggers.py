"""The trigger of a run: its spec stands in the report, what it has learned in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pbe_fast.engine.files import atomic_write
from pbe_fast.errors import InputError
from pbe_fast.models.weights import read_weights
from pbe_fast.result import discard, read_report
from pbe_fast.triggers import Trigger, make_trigger

TRIGGER_NAME = "trigger.safetensors"


def save_trigger_weights(trigger: Trigger, folder: Path) -> list[str]:
    """Write what a trained trigger has learned; the names of the files written, none for a trigger without weights."""
    discard(folder, [TRIGGER_NAME])
    weights = trigger.weights()
    if not weights:
        return []
    with atomic_write(folder / TRIGGER_NAME) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    return [TRIGGER_NAME]


def load_trigger(folder: str | Path) -> Trigger:
    """The trigger of the attack that wrote a folder. Nothing in its files is ever executed.

    Args:
        folder: With the ``report.json`` that attack or demo wrote and, where the trigger was trained, its
            ``trigger.safetensors``.

    Raises:
        InputError: No such folder, a report without a trigger or with one that cannot be made, or weights that are
            missing, damaged or another trigger's.
    """
    folder = Path(folder)
    try:
        spec: Any = (read_report(folder) or {})["attack"]["trigger"]
        trigger = make_trigger(**spec)
    except (KeyError, TypeError, ValueError) as error:
        accepted = "a report.json as attack writes it, with the trigger's spec"
        raise InputError(f"trigger of {folder}", got=repr(error), accepted=accepted) from error
    if trigger.weights():
        trigger.load_weights(read_weights(folder / TRIGGER_NAME))
    return trigger
