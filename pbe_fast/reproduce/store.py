"""Cells on the disk: one JSON each, written whole, and a claim for each that is being made."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pbe_fast.engine.files import write_text
from pbe_fast.errors import InputError
from pbe_fast.reproduce.cells import Cell, Subject
from pbe_fast.result import plain

HEARTBEAT_S = 20.0
# A claim that has not been renewed for so long is that of a process that is gone.
STALE_S = 300.0
_HOST = f"{socket.gethostname()}/{uuid.getnode():x}"


class Store:
    """The folder of a scale: ``cells/`` with the results, ``models/`` with what can be made again.

    Args:
        root: Of the scale; made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, cell: Cell) -> Path:
        """Where the cell's JSON is."""
        return self.root / "cells" / f"{cell.name}.json"

    def model_folder(self, subject: Subject) -> Path:
        """Where the subject's model is cached."""
        return self.root / "models" / subject.name

    def done(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return self.path(cell).is_file()

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured; None where the cell is not finished.

        Raises:
            InputError: A file that is not a cell's.
        """
        path = self.path(cell)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"cell {path}", got=error, accepted="JSON as reproduce writes it") from error
        if not isinstance(entry, dict) or "metrics" not in entry:
            raise InputError(f"cell {path}", got="JSON without metrics", accepted="JSON as reproduce writes it")
        return entry

    def write(self, cell: Cell, entry: Mapping[str, Any]) -> None:
        """Keep a finished cell."""
        write_text(self.path(cell), json.dumps(plain(dict(entry)), indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has ``path``, a file or folder that is to be made, to itself while the block runs.

    The claim is a file beside it, made by O_EXCL, renewed by a thread, and gone afterwards. One that was left by a
    process that died is taken over. (Two that find it at the same moment may both do the work: they write the same.)
    """
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    if not _take(lock):
        yield False
        return
    stopped = threading.Event()

    def renew() -> None:
        while not stopped.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        stopped.set()
        thread.join()
        lock.unlink(missing_ok=True)


def _take(lock: Path) -> bool:
    for _ in range(2):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if not _is_stale(lock):
                return False
            # By rename, which only one of several processes can do.
            aside = lock.with_name(f".{lock.name}.{secrets.token_hex(4)}.tmp")
            try:
                os.replace(lock, aside)
            except FileNotFoundError:
                continue
            aside.unlink(missing_ok=True)
        else:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"host": _HOST, "pid": os.getpid()}, file)
            return True
    return False


def _is_stale(lock: Path) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        host, pid = owner["host"], int(owner["pid"])
    except (OSError, ValueError, TypeError, KeyError):
        # Its owner is just writing it, or died doing so.
        return age > STALE_S
    return age > STALE_S or (host == _HOST and not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
