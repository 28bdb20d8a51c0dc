"""Every Triton kernel compiles for three GPU generations without a GPU, and keeps its values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pbe_fast.kernels import aot, backends

pytestmark = pytest.mark.skipif(not backends.triton_installed(), reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("op", backends.TRITON_OPS)
def test_kernels_compile_without_spills(op: str) -> None:
    # In a process of its own: this one may run Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pbe_fast.kernels.aot", "--op", op, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(aot.ARCHITECTURES), result.stderr
    assert [row for row in rows if row["spills"]] == []
    assert all(8 <= row["registers"] <= 255 for row in rows)
    assert result.returncode == 0, result.stderr
