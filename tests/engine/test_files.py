"""Nothing half-written is ever seen under a final name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pbe_fast.engine.files import atomic_write, prepare_output, replacing, write_text
from pbe_fast.errors import OutputError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "a" / "b" / "model.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"first half ")
        assert not path.exists()
        with temporary.open("ab") as handle:
            handle.write(b"second half")
    assert path.read_bytes() == b"first half second half"
    assert names(path.parent) == ["model.bin"]


def test_a_file_has_the_mode_that_the_umask_gives_whoever_writes_it(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "model.safetensors") as temporary:
            save_file({"weight": torch.zeros(2)}, temporary)
        write_text(tmp_path / "config.json", "{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interruption_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    code = (
        "import sys, time\nfrom pbe_fast.engine.files import atomic_write\n"
        f"with atomic_write({str(path)!r}) as t:\n"
        "    t.write_text('ne'); print('writing', flush=True); time.sleep(60)\n"
    )
    # A child of a process that ignores interrupts, as one under nohup does, would ignore them too.
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env=_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(20) != 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def _environment():
    # The child may start in another folder than the package's.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_files_take_their_places_together_or_not_at_all(tmp_path):
    def state():
        return {p.name: p.read_text() for p in tmp_path.iterdir()}

    before = {"report.json": "old", "ranking.csv": "old", "notes.txt": "mine"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    options = {"last": "report.json", "stale": ("report.json", "ranking.*")}
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(tmp_path, **options) as new:
            (new / "report.json").write_text("half")
            raise error
        assert state() == before
    with replacing(tmp_path, **options) as new:
        (new / "model.onnx").write_text("new")
        (new / "report.json").write_text("new")
        assert {k: v for k, v in before.items()} == {n: (tmp_path / n).read_text() for n in before}
    assert state() == {"report.json": "new", "model.onnx": "new", "notes.txt": "mine"}


def test_the_suffix_is_kept_for_writers_that_append_one(tmp_path):
    with atomic_write(tmp_path / "set.npz") as temporary:
        np.savez(temporary, a=np.arange(3))
    assert names(tmp_path) == ["set.npz"]
    assert np.load(tmp_path / "set.npz")["a"].tolist() == [0, 1, 2]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="nothing was written"), atomic_write(tmp_path / "x"):
        pass
    assert names(tmp_path) == []


def test_a_missing_file_inside_the_block_is_the_blocks_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "x"):
        (tmp_path / "elsewhere").read_text()


def test_the_final_name_is_a_folder(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="got a folder"), atomic_write(tmp_path / "x"):
        pass


def test_text_is_utf8_with_plain_newlines(tmp_path):
    write_text(tmp_path / "x.txt", "é\n")
    assert (tmp_path / "x.txt").read_bytes() == b"\xc3\xa9\n"


def test_a_new_folder_is_made(tmp_path):
    folder = prepare_output(tmp_path / "runs" / "new", force=False)
    assert folder.is_dir()
    assert names(folder) == []


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "ranking.csv", "train.npz", "m.onnx"])
def test_a_run_is_not_overwritten_unless_forced(tmp_path, name):
    (tmp_path / name).write_text("result")
    with pytest.raises(OutputError, match=rf"already holds a run: got {name}; accepted: .*--force"):
        prepare_output(tmp_path, force=False)
    assert prepare_output(tmp_path, force=True) == tmp_path
    assert (tmp_path / name).read_text() == "result"


def test_other_files_are_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_output(tmp_path, force=False) == tmp_path
    assert names(tmp_path) == ["notes.txt"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="got a file"):
        prepare_output(tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="cannot write in"):
        prepare_output(tmp_path / "out" / "below", force=True)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system where nobody can make a folder")
def test_a_folder_that_nobody_may_write(tmp_path):
    with pytest.raises(OutputError, match="cannot write in /proc/pbe"):
        prepare_output("/proc/pbe", force=False)
    with pytest.raises(OutputError, match="cannot write in /proc/self"), atomic_write("/proc/self/x"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write in"):
            prepare_output(tmp_path, force=False)
    finally:
        tmp_path.chmod(0o700)


def test_the_new_file_is_younger_than_the_old(tmp_path):
    path = write_text(tmp_path / "x", "old")
    os.utime(path, (0, 0))
    write_text(path, "new")
    assert path.stat().st_mtime > time.time() - 3600


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="limits on the size of files are POSIX")
@pytest.mark.parametrize("writer", ["path.write_bytes(bytes(9000))", "save_file({'w': torch.zeros(9000)}, path)"])
def test_no_room_on_the_disk(tmp_path, writer):
    code = f"""
import resource, signal, torch
from safetensors.torch import save_file
from pbe_fast.engine.files import atomic_write
from pbe_fast.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    with atomic_write({str(tmp_path / "out.safetensors")!r}) as path:
        {writer}
except OutputError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("got File too large; accepted: a disk with room for it"), ran.stderr
    assert list(tmp_path.iterdir()) == []
