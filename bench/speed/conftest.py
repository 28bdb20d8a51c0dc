"""Benchmarks import racing.py and the like from beside them; ``--record FOLDER`` keeps what they measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from cases import SCALE, SEED  # noqa: E402
from results import write_results  # noqa: E402

from pbe_fast.engine.machine import describe  # noqa: E402

_CASES: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="write a result file of this machine and date there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: an NVIDIA GPU and PyTorch with CUDA"))
        if item.get_closest_marker("data") and not os.environ.get("PBE_FAST_DATA"):
            item.add_marker(
                pytest.mark.skip(
                    reason="needs real images, and nothing is downloaded: set PBE_FAST_DATA to their folder"
                )
            )


@pytest.fixture(autouse=True)
def keep_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a case has stored with its benchmark goes into the result file, also where a promise was missed."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None and benchmark.extra_info:
        _CASES.append({"name": request.node.name, **benchmark.extra_info})


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--record")
    if folder and _CASES:
        path = write_results(Path(folder), _CASES, described=describe(), seed=SEED, scale=SCALE)
        print(f"\nrecorded: {path}")
