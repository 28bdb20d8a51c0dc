"""The process: its exit code is 130 after a Ctrl-C and 143 after a SIGTERM, whenever it came and whoever caught it."""

from __future__ import annotations

import sys

from pbe_fast.cli import INTERRUPTED
from pbe_fast.engine import interrupts


def start() -> None:
    """What ``pbe-fast`` runs; ends the process."""
    interrupts.listen()
    code: object = 0
    try:
        from pbe_fast.cli.commands import main

        main(prog_name="pbe-fast")
    except SystemExit as end:
        code = end.code
    except BaseException:
        if not interrupts.pressed():
            raise
    interrupts.close_ears()
    if interrupts.pressed() and code != interrupts.exit_code():
        # Before or after the command itself, which says so where it is interrupted.
        print(INTERRUPTED, file=sys.stderr)
        code = interrupts.exit_code()
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    start()
