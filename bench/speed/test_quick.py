"""The ratios that CI compares (bench/compare.py), measured in the same run as everything else."""

from __future__ import annotations

import statistics

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from quick import CASES
from racing import iqr


@pytest.mark.parametrize("name", list(CASES))
def test_quick(benchmark: BenchmarkFixture, name: str) -> None:
    result = benchmark.pedantic(CASES[name], rounds=1)
    benchmark.extra_info.update(
        quick=name,
        ratio=result.ratio,
        ours_ms=1e3 * statistics.median(result.ours),
        ours_iqr_ms=1e3 * iqr(result.ours),
        peer_ms=1e3 * statistics.median(result.peer),
        peer_iqr_ms=1e3 * iqr(result.peer),
        rounds=len(result.ours),
        threads=torch.get_num_threads(),
        device="cpu",
    )
    print(f"\n  {name}: {result.ratio:.2f}")
    assert result.ratio > 0
