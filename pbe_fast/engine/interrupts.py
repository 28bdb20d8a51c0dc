"""Ctrl-C, so that none is lost: code of others may catch a KeyboardInterrupt, so the press itself is kept as well."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_pressed = False


def listen() -> None:
    """From now on a Ctrl-C raises KeyboardInterrupt, as ever, and `pressed` knows of it.

    Nothing changes where interrupts are ignored, as under ``nohup``, or handled by somebody else.
    """
    if threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _note)


def close_ears() -> None:
    """Ignores interrupts from now on: the process is about to end, and its exit code is settled."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def pressed() -> bool:
    """Whether there was a Ctrl-C since `listen`."""
    return _pressed


def check() -> None:
    """Raises KeyboardInterrupt if there was one: importing torch alone loses some."""
    if _pressed:
        raise KeyboardInterrupt


def _note(_: int, __: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
