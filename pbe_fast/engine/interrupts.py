"""Ctrl-C and SIGTERM, so that none is lost: others may catch a KeyboardInterrupt, so the signal itself is kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType

# What a process does about them before anybody else has said otherwise.
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_received: int | None = None


def listen() -> None:
    """From now on a Ctrl-C, and a SIGTERM too, raises KeyboardInterrupt, and `pressed` knows of it.

    Nothing changes where they are ignored, as Ctrl-C is under ``nohup``, or handled by somebody else.
    """
    if threading.current_thread() is threading.main_thread():
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                signal.signal(number, _note)


def close_ears() -> None:
    """Ignores interrupts from now on: the process is about to end, and its exit code is settled."""
    for number in _DEFAULTS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)


def pressed(number: int | None = None) -> bool:
    """Whether there was one since `listen`; with ``number``, whether it was that signal."""
    return _received is not None and number in (None, _received)


def exit_code() -> int:
    """What a shell expects of a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (signal.SIGINT if _received is None else _received)


def check() -> None:
    """Raises KeyboardInterrupt if there was one: importing torch alone loses some."""
    if pressed():
        raise KeyboardInterrupt


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt
