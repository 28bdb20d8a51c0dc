from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pbe_fast.engine import profile
from pbe_fast.engine.machine import measure_peak
from pbe_fast.engine.profile import Profile, count_flops

CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 4, 5))


def _profile(model: nn.Module) -> Profile:
    return Profile(model, (3, 8, 6), device=CPU, dtype=torch.float32)


def test_flops_are_those_of_the_products(model: nn.Module) -> None:
    # A 3 x 3 x 3 kernel at 6 x 4 places for 4 channels, and a 96 x 5 matrix; a multiplication and an addition each.
    assert count_flops(model.train(), (3, 8, 6), CPU) == 2 * (27 * 6 * 4 * 4 + 96 * 5)
    assert model.training


def test_the_peak_is_measured_in_both_kinds() -> None:
    peak = measure_peak(CPU, torch.float32)
    assert 1e8 < peak.flops_per_second < 1e16
    assert 1e7 < peak.copy_bytes_per_second < 1e14


def test_phases_add_up(model: nn.Module) -> None:
    measured = _profile(model)
    with measured.running():
        for _ in range(2):
            with measured.phase("first"):
                time.sleep(0.02)
                profile.record(images=10, forwards=30)
            with measured.phase("second"):
                time.sleep(0.01)
        profile.record(images=1000, forwards=1000)  # in no phase
    profile.record(images=1000, forwards=1000)  # in no profile
    first, second = measured.rows()
    assert (first["phase"], second["phase"]) == ("first", "second")
    assert first["seconds"] >= 0.04
    assert first["images_per_second"] == pytest.approx(20 / first["seconds"])
    assert first["forwards_per_second"] == pytest.approx(60 / first["seconds"])
    flops = 60 * measured.flops_per_forward / first["seconds"]
    assert first["share_of_peak"] == pytest.approx(flops / measured.peak.flops_per_second)
    assert second["share_of_peak"] == 0
    lines = measured.table().splitlines()
    assert [line.split()[0] for line in lines] == ["phase", "first", "second"]
    assert len(set(map(len, lines))) == 1
    json.dumps(measured.report(), allow_nan=False)


def test_the_trace_holds_the_first_steps_of_each_phase(model: nn.Module, tmp_path: Path) -> None:
    measured = _profile(model)
    with measured.running(), torch.no_grad():
        for name in ("one", "two", "one"):
            with measured.phase(name):
                for _ in range(5):
                    model(torch.zeros(2, 3, 8, 6))
                    profile.record(images=2, forwards=2)
    trace = json.loads(measured.write_trace(tmp_path / "trace.json").read_text())
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = {e["ts"]: e for e in events if e.get("cat") == "phase"}
    assert [spans[ts]["name"] for ts in sorted(spans)] == ["one", "two", "one"]
    convolutions = [e for e in events if e["name"] == "aten::conv2d"]
    assert len(convolutions) == 2 * 3
    first, second, third = (spans[ts] for ts in sorted(spans))
    for span, inside in ((first, convolutions[:3]), (second, convolutions[3:]), (third, [])):
        held = [e for e in convolutions if span["ts"] <= e["ts"] <= span["ts"] + span["dur"]]
        assert held == inside


def test_tracing_does_not_count(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = torch.profiler.profile.stop

    def slow(self: torch.profiler.profile) -> None:
        time.sleep(0.5)
        stop(self)

    monkeypatch.setattr(torch.profiler.profile, "stop", slow)
    measured = _profile(model)
    with measured.running(), measured.phase("one"):
        for _ in range(4):
            profile.record(images=1, forwards=1)
    assert measured.rows()[0]["seconds"] < 0.4


def test_nothing_is_said_of_the_tracing() -> None:
    code = """
import os, torch
from torch import nn
from pbe_fast.engine.profile import Profile
measured = Profile(nn.Flatten(), (1, 2, 2), device=torch.device("cpu"), dtype=torch.float32)
for name in "ab":
    with measured.running(), measured.phase(name):
        pass
assert "KINETO_LOG_LEVEL" not in os.environ
"""
    env = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_ends_a_phase(model: nn.Module) -> None:
    measured = _profile(model)
    with measured.running():
        with pytest.raises(ZeroDivisionError), measured.phase("one"):
            raise ZeroDivisionError
        with measured.phase("two"):
            profile.record(images=1, forwards=1)
    assert [row["phase"] for row in measured.rows()] == ["one", "two"]
