"""Theorem 1, by the check that the repository has; its proof and findings are in docs/theorem.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pbe_fast.errors import InputError

_CHECK = Path(__file__).parents[2] / "bench" / "efficacy" / "theorem.py"


def check_theorem(folder: Path) -> tuple[bool, str]:
    """Run the check; it writes theorem.csv and theorem.png to ``folder``.

    Returns:
        Whether the bound that is proved was met everywhere, and what the check prints.

    Raises:
        InputError: An installed package without the repository around it, or a check that could not be run.
    """
    if not _CHECK.is_file():
        raise InputError(
            "--theorem", got="an installed package", accepted="a checkout of the repository: bench/efficacy/theorem.py"
        )
    done = subprocess.run([sys.executable, str(_CHECK), str(folder)], capture_output=True, text=True, check=False)
    if not done.stdout:
        raise InputError(f"check of Theorem 1, {_CHECK}", got=done.stderr.strip()[-500:], accepted="a table of bounds")
    lines = "\n".join(f"- {line}" for line in done.stdout.splitlines())
    return done.returncode == 0, f"## Theorem 1\n\n{lines}\n"
