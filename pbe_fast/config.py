"""Every option of the package, as frozen dataclasses with defaults that work.

The command line builds its flags from these fields (``help`` and ``choices`` in their metadata), reports store them,
and `to_dict` / `from_dict` carry them through JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pbe_fast.errors import InputError

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with the text that ``--help`` prints for it."""
    metadata = {"help": help, "choices": choices}
    if dataclasses.is_dataclass(default):
        return field(default=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _check(condition: bool, name: str, got: object, accepted: str) -> None:
    if not condition:
        raise InputError(f"option '{name}'", got=got, accepted=accepted)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)
