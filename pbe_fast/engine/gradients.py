"""Gradients for what trains, wherever it is called from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients are recorded inside, also where the caller switched them off: no_grad, inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
