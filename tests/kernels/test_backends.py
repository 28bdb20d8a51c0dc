from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from pbe_fast.kernels import backends


def test_every_operation_has_its_reference() -> None:
    available = backends.available_backends()
    assert tuple(available) == backends.OPS
    assert all(versions[0] == "reference" for versions in available.values())


@pytest.mark.skipif(backends.native() is None, reason="the native module is not built")
@pytest.mark.parametrize("op", backends.OPS)
def test_the_native_build_holds_every_operation(op: str) -> None:
    if not getattr(backends.native_op(op), "is_supported", lambda: True)():
        pytest.skip("this processor lacks the instructions")
    assert "native" in backends.available_backends()[op]


def test_triton_is_available_where_its_kernels_can_run() -> None:
    expected = backends.triton_installed() and (backends.triton_interpreted() or torch.cuda.is_available())
    for op, versions in backends.available_backends().items():
        assert ("triton" in versions) == (expected and op in backends.TRITON_OPS)


def test_without_the_native_build_the_reference_takes_its_place() -> None:
    code = """
import json, torch
from pbe_fast.kernels.backends import available_backends
from pbe_fast.kernels.pgd_step import pgd_step
torch.manual_seed(0)
images = torch.rand(2, 3, 4, 4)
arguments = dict(adv=images, grad=torch.randn(2, 3, 4, 4), origin=images, eps=0.1, alpha=0.05)
fallen_back = pgd_step(**arguments)
try:
    pgd_step(**arguments, backend="native")
    error = ""
except RuntimeError as exception:
    error = str(exception)
same = all(map(torch.equal, fallen_back, pgd_step(**arguments, backend="reference")))
print(json.dumps([available_backends(), same, error]))
"""
    environment = os.environ | {"PBE_FAST_NATIVE": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    available, same, error = json.loads(result.stdout)
    assert all("native" not in versions for versions in available.values())
    assert same
    assert "got 'native', but the native module pbe_fast._native is not built" in error
    assert "accepted here: ('reference'" in error


@pytest.mark.skipif(backends.native() is None or not hasattr(os, "fork"), reason="no native module, or no fork")
def test_a_child_does_not_wait_for_threads_that_pytorch_had_before_the_fork() -> None:
    code = """
import os, torch
from pbe_fast.kernels.pgd_step import pgd_step_
torch.set_num_threads(3)
images = torch.rand(64, 3, 32, 32)
torch.rand(10**6).add(1.0)  # PyTorch's threads run, and no operation of ours has yet
child = os.fork()
if child == 0:
    pgd_step_(images, images, images, eps=0.1, alpha=0.1)
    os._exit(0)
os._exit(os.waitpid(child, 0)[1] != 0)
"""
    # Its own session: a child that hangs would otherwise be left behind.
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            assert process.wait(30) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_triton_by_name_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"got 'triton', but (there is no CUDA device|the package triton is not)"):
        backends.require("pgd_step", "triton")


@pytest.mark.parametrize(("op", "backend"), [("pgd_step", "cuda"), ("wrap", "native")])
def test_unknown_names(op: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"got '{backend}' of '{op}'; accepted: .*'native', 'triton'.*'pgd_step'"):
        backends.require(op, backend)
