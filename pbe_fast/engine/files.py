"""Writing results so that nothing is ever seen half-written under its final name."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pbe_fast.errors import OutputError

# What a command of the package leaves in its output folder; a folder with none of these may hold anything else.
RUN_FILES = (
    "*.safetensors",
    "*.onnx",
    "*.npz",
    "config.json",
    "report.json",
    "report.html",
    "ranking.csv",
    "trace.json",
)

# A full disk, a quota that is used up, a limit on the size of files.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends well.

    The data are on the disk before the name is (fsync, then rename), so that a reader finds the old file or the whole
    new one, whose mode is that of any new file there. When the block raises, KeyboardInterrupt included, the temporary
    file goes and ``path`` is as it was.

    Args:
        path: The final name. Missing parent folders are made.

    Yields:
        A path in the same folder, with the same suffix, where nothing exists yet.

    Raises:
        OutputError: The folder cannot be made or written to, ``path`` is a folder, the disk is full, or the block wrote
            no file.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: got a folder; accepted: the name of a file")
    mode = _require_writable(path.parent)
    # The suffix stays at the end: numpy and matplotlib choose the format by it, or append their own.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        # Some writers, safetensors among them, make files that only their owner may read.
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except FileNotFoundError as error:
        if temporary.exists() or error.filename != str(temporary):
            raise
        raise OutputError(f"nothing was written for {path}") from error
    except Exception as error:
        if (number := _errno(error)) not in _NO_ROOM:
            raise
        raise OutputError(
            f"cannot write {path}: got {os.strerror(number)}; accepted: a disk with room for it"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(path.parent)


@contextlib.contextmanager
def replacing(folder: Path, *, last: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write a run's files into, which take the places of an earlier run's when the block ends well.

    Until then the earlier run is whole: when the block raises, nothing of it has changed.

    Args:
        folder: Where the files will be.
        last: The file that speaks of the others, and so gets its place after them.
        stale: Names or patterns of an earlier run's files that the new ones make untrue.
    """
    fresh = folder / f".{secrets.token_hex(4)}.tmp"
    fresh.mkdir()
    try:
        yield fresh
        for pattern in stale:
            for path in folder.glob(pattern):
                path.unlink()
        for path in sorted(fresh.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` as UTF-8 under its final name at once; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def prepare_output(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """The folder for a run's results, made if need be and known to be writable before any work starts.

    Args:
        folder: Where results will go. Parents are made.
        force: Accept a folder that holds a run. Nothing is deleted here: each file is replaced as its successor is
            ready, so that an interrupted run costs the old one nothing.

    Returns:
        ``folder`` as a Path.

    Raises:
        OutputError: It is a file, cannot be made or written to, or holds a run and ``force`` is false.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output folder {folder}: got a file; accepted: a folder, or a name that is free")
    _require_writable(folder)
    found = sorted({p.name for pattern in RUN_FILES for p in folder.glob(pattern) if not p.name.startswith(".")})
    if found and not force:
        raise OutputError(
            f"output folder {folder} already holds a run: got {', '.join(found)}; "
            "accepted: an empty folder, or --force (force=True) to replace them"
        )
    return folder


def _require_writable(folder: Path) -> int:
    """Makes the folder if need be; returns the mode that a new file in it gets (which the umask decides)."""
    # Tried rather than asked: os.access answers yes to root and on read-only mounts alike.
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    except OSError as error:
        raise OutputError(
            f"cannot write in {folder}: got {error.strerror or error}; accepted: a folder that can be written to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _errno(error: Exception) -> int:
    """The system's number of an error; 0 where it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    # As safetensors, which is written in Rust, has it.
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
