from __future__ import annotations

import math

import pytest
import torch

from pbe_fast.triggers import SIG


@pytest.mark.parametrize(("delta", "frequency"), [(40 / 255, 6.0), (20 / 255, 6.0), (0.1, 2.5)])
@pytest.mark.parametrize("width", [32, 45])
def test_a_sinusoid_over_the_columns(delta: float, frequency: float, width: int) -> None:
    images = torch.full((2, 3, 5, width), 0.5)
    got = SIG((3, 5, width), delta=delta, frequency=frequency).apply(images)
    for j in range(width):
        expected = 0.5 + delta * math.sin(2 * math.pi * j * frequency / width)
        torch.testing.assert_close(got[..., j], torch.full((2, 3, 5), expected), atol=1e-5, rtol=0)


def test_the_defaults_and_the_cut_at_0_and_1() -> None:
    signal = torch.sin(2 * torch.pi * torch.arange(32) * 6 / 32) * 40 / 255
    for level in (0.0, 1.0):
        got = SIG((1, 4, 32)).apply(torch.full((1, 1, 4, 32), level))
        torch.testing.assert_close(got[0, 0], (level + signal).clamp(0, 1).expand(4, 32), atol=1e-5, rtol=0)
