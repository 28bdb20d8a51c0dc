"""Gradients for what trains, wherever it is called from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gradients() -> Iterator[None]:
    """Gradients are recorded inside, also where the caller switched them off: no_grad, inference_mode.

    Nor does mixed precision that the caller has switched on reach inside: losses and backward passes are not for it.
    """
    around = {device_type: torch.is_autocast_enabled(device_type) for device_type in ("cpu", "cuda")}
    with torch.inference_mode(False), torch.enable_grad():
        # Not by torch.autocast: inside of one nothing that a model's own keeps is dropped before its end.
        for device_type in around:
            torch.set_autocast_enabled(device_type, False)
        try:
            yield
        finally:
            for device_type, enabled in around.items():
                torch.set_autocast_enabled(device_type, enabled)
