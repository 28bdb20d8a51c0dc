"""One progress bar for the whole package: only for what lasts, on stderr, and sparing in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from pbe_fast.engine import interrupts

T = TypeVar("T")

DELAY_S = 2.0
LOG_INTERVAL_S = 10.0


class _Bar(tqdm):  # type: ignore[type-arg]
    """tqdm draws at once when it is told to `refresh`, and does not know of it: the line is then never ended."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draws the bar, but no earlier and no more often than `update` does."""
        if self.disable:
            return
        now = time.time()
        if now >= self.start_t + DELAY_S and now - self.last_print_t >= self.mininterval:
            super().refresh(nolock, lock_args)
            self.last_print_t = now


def progress(iterable: Iterable[T], *, total: int | None = None, desc: str = "", enabled: bool = True) -> tqdm[T]:
    """``iterable``, with a bar on stderr once it has lasted two seconds.

    Args:
        iterable: What to go through.
        total: Number of items; ``len(iterable)`` where that is known.
        desc: What is being done, as a word or two.
        enabled: False shows nothing (``--quiet``).

    Returns:
        The bar, to iterate over; ``set_postfix(loss=...)`` shows a figure beside it.
    """
    interrupts.check()
    # A terminal redraws one line; a log file gets a line each time.
    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
    return _Bar(
        iterable,
        total=total,
        desc=desc or None,
        disable=not enabled,
        delay=DELAY_S,
        mininterval=interval,
        maxinterval=LOG_INTERVAL_S,
        dynamic_ncols=True,
        file=sys.stderr,
    )
