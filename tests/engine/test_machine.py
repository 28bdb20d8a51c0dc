"""Where a result came from."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys

import numpy
import pytest
import torch

from pbe_fast import __version__
from pbe_fast.engine import machine
from pbe_fast.engine.machine import describe, git_commit, measure_peak


def test_describe_is_plain_json_and_true():
    found = json.loads(json.dumps(describe()))
    assert found["versions"]["pbe_fast"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torchvision", "triton", "onnx", "onnxruntime", "onnxscript"} <= found["versions"].keys()
    assert found["machine"]["processor"]
    assert 1 <= found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert (found["machine"]["gpu"] is None) == (not torch.cuda.is_available())
    date = datetime.datetime.fromisoformat(found["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    assert abs(date - datetime.datetime.now(datetime.timezone.utc)) < datetime.timedelta(minutes=1)


def test_describe_does_not_import_what_it_asks_the_version_of():
    code = (
        "import sys; from pbe_fast.engine.machine import describe; describe(); "
        "print([m for m in ('triton', 'torchvision', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def _git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    _git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "--no-verify", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "untracked").write_text("1")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    # An installed package below somebody's repository is not that repository.
    inner = tmp_path / "venv" / "site-packages"
    inner.mkdir(parents=True)
    assert git_commit(inner) is None


@pytest.mark.parametrize(
    ("device", "dtype", "convolutions", "products"),
    [
        ("cuda", torch.float32, True, "tf32"),
        ("cuda", torch.float32, False, "none"),
        ("cuda", torch.bfloat16, True, "none"),
        ("cpu", torch.float32, True, "none"),
    ],
)
def test_the_peak_of_float32_is_that_of_what_convolutions_compute_in(
    monkeypatch, device, dtype, convolutions, products
):
    seen = []

    def noted(function, device):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return 1.0

    # The operands stay on the CPU, and small.
    randn, one = torch.randn, torch.zeros(1, dtype=torch.uint8)
    monkeypatch.setattr(machine, "_shortest", noted)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: randn(2, 2))
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: one)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=convolutions):
        measure_peak(torch.device(device), dtype)
    assert seen == [products, "none"]
    # Nor is anything left that torch's older names for the same do not agree with.
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_of_several_gpus_the_one_in_use_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"GPU {index}")
    for used, name in ((None, "GPU 0"), (1, "GPU 1"), (2, "GPU 2")):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index, used=used: 100 * (index == used))
        assert describe()["machine"]["gpu"] == name
