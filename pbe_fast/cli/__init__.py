"""The command line: arguments and printing.

What starts it (`pbe_fast.cli.__main__`) listens for Ctrl-C and SIGTERM before anything else is imported, so nothing is
imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe_fast.cli.commands import main

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = "interrupted: nothing half-written was left"


def __getattr__(name: str) -> Any:
    if name != "main":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pbe_fast.cli.commands import main

    return main
