"""What is in a picture."""

from __future__ import annotations

import numpy as np


def share(pixels: np.ndarray, colour: str) -> float:
    """How much of the picture has exactly this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(pixels[:, :, :3] - wanted).max(2) < 1e-3).mean())
