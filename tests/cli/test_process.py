"""The command as a process of its own: start-up, exit codes, Ctrl-C."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pbe_fast

COMMAND = [sys.executable, "-m", "pbe_fast.cli"]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from pbe_fast.cli import main\n"
        "try:\n"
        "    main(['purify', '--help'], prog_name='pbe-fast')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'onnx'} & sys.modules.keys()\n"
        "    print('code', end.code, 'heavy', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 heavy []"


def test_the_installed_command() -> None:
    script = shutil.which("pbe-fast", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pbe-fast, version {pbe_fast.__version__}\n"


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    command = [*COMMAND, "attack", "--data", "digits:train", "--arch", "nothing", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: unknown architecture; got 'nothing'; accepted: .*\n", done.stderr)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "attack", "--data", "digits:train", "--arch", "small_cnn", "--epochs", "10000"]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        # The note comes when everything is read and checked and the training is about to start.
        assert "training small_cnn" in process.stderr.readline()
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == "" and stderr.splitlines()[-1] == "interrupted: nothing half-written was left"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
