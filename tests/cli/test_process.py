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
from pbe_fast.cli.shell import EXIT_CODES

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


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pbe_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"pbe-fast, version {pbe_fast.__version__}\n"


def test_the_readme_has_every_exit_code() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told = " ".join(readme[readme.index("\nExit codes: ") :].split(".")[0].split())
    helped = re.findall(r"^  (\d+)  ", EXIT_CODES, re.MULTILINE)
    assert re.findall(r"(?:: |, )(\d+) ", told) == helped


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    command = [*COMMAND, "attack", "--data", "digits:train", "--arch", "nothing", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: unknown architecture; got 'nothing'; accepted: .*\n", done.stderr)


def heed_interrupts() -> None:
    # A child of a process that ignores them, as one under nohup does, would ignore them too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def interrupt(command: list[str], ready: str, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Start a command, press Ctrl-C (or send another signal) when a line on its stderr holds ``ready``.

    Returns exit code, stdout, rest of stderr.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    assert process.stderr is not None
    try:
        seen = []
        while ready not in (seen or [""])[-1]:
            seen.append(process.stderr.readline())
            assert seen[-1], "".join(seen)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


LONG = ["attack", "--data", "digits:train", "--arch", "small_cnn", "--epochs", "10000"]


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(number: int, wanted: int, tmp_path: Path) -> None:
    # The note comes when everything is read and checked and the training is about to start.
    command = [*COMMAND, *LONG, "--out", str(tmp_path / "out")]
    code, stdout, stderr = interrupt(command, "training small_cnn", number)
    assert code == wanted
    assert stdout == "" and stderr.splitlines()[-1] == "interrupted: nothing half-written was left"
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_what_ends_the_command_ends_the_workers_too(number: signal.Signals, wanted: int, tmp_path: Path) -> None:
    # They would go on with all the cells, and the command would wait for them, or not know of them.
    command = [*COMMAND, "reproduce", "--scale", "smoke", "--table", "1", "--jobs", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    try:
        give_up = time.monotonic() + 120
        while not list(tmp_path.glob("smoke/cells/*")) and time.monotonic() < give_up:
            time.sleep(0.1)
        process.send_signal(number)
        # Until the last of them has closed it.
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == wanted
    if number == signal.SIGTERM:
        # Workers that are still starting may have a last word.
        assert b"interrupted: nothing half-written was left" in stderr.splitlines()


@pytest.mark.parametrize("module", ["click.globals", "pbe_fast.cli.options", "numpy.linalg", "torch.nn.functional"])
def test_ctrl_c_while_it_starts(module: str, tmp_path: Path) -> None:
    # -X importtime says on stderr what has been imported: no guess at how fast this machine is.
    command = [COMMAND[0], "-X", "importtime", *COMMAND[1:], *LONG, "--out", str(tmp_path / "out")]
    code, stdout, stderr = interrupt(command, f" {module}\n")
    assert code == 130
    assert stdout == "" and "interrupted: nothing half-written was left\n" in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = (
        "import signal\n"
        "from pbe_fast.engine import interrupts\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "interrupts.listen()\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "print(interrupts.pressed())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("name", "wanted"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("then", ["pass", "raise ImportError('half a module')", "sys.exit(1)"])
def test_a_signal_that_somebody_caught_still_ends_the_command(then: str, name: str, wanted: int) -> None:
    code = (
        "import signal, sys\n"
        "from pbe_fast.cli import commands, __main__\n"
        "def swallow():\n"
        "    try:\n"
        f"        signal.raise_signal(signal.{name})\n"
        "    except BaseException:\n"
        f"        {then}\n"
        "commands.main.commands['demo'].params.clear()\n"
        "commands.main.commands['demo'].callback = swallow\n"
        "sys.argv[1:] = ['demo']\n"
        "__main__.start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=heed_interrupts, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (wanted, "", "interrupted: nothing half-written was left\n")
