"""Markers, real images, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pbe_fast.engine import precision

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports Triton: without a GPU its kernels run in the interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: an NVIDIA GPU and PyTorch with CUDA"))
        if item.get_closest_marker("data") and not os.environ.get("PBE_FAST_DATA"):
            item.add_marker(
                pytest.mark.skip(
                    reason="needs real images, and nothing is downloaded: set PBE_FAST_DATA to their folder"
                )
            )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images, for tests marked `data`."""
    folder = Path(os.environ["PBE_FAST_DATA"])
    if not folder.is_dir():
        pytest.fail(f"PBE_FAST_DATA; got {folder}, which is no folder")
    return folder


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """On a GPU as well, see `pbe_fast.engine.precision`."""
    with precision.exact_float32(torch.device("cuda")):
        yield
