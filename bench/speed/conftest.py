"""Benchmarks import racing.py from beside them, and their JSON says where the numbers come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pbe_fast.engine.machine import describe

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pbe_fast"] = describe()
