"""The command line in this process, and what its reports hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from click.testing import CliRunner, Result

from pbe_fast.cli import main

METRICS = {"acc", "asr", "asr_with_target", "recovered_acc"}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def report_of(*args: object) -> dict:
    result = run(*args, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
