from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def outputs_full_of_nan() -> Iterator[None]:
    """Whatever an operation allocates and does not write shows as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
