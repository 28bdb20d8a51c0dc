from __future__ import annotations

import math

import pytest
import torch

from pbe_fast.calibration import Largest, fit_concentration


def _draw(concentration: float, models: int, *, total: int = 300, destinations: int = 9) -> list[Largest]:
    """The largest of ``destinations`` shares, model by model, as the null has them."""
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.full((destinations,), concentration).double()).sample((models,))
    counts = torch.distributions.Multinomial(total, probs=shares).sample()
    return [Largest(float(c.max()) / total, total, destinations, destinations) for c in counts]


@pytest.mark.parametrize("concentration", [1.0, 5.0])
def test_benign_models_have_even_p_values(concentration: float) -> None:
    p = torch.tensor([one.p_value(concentration) for one in _draw(concentration, 800)])
    for level in (0.05, 0.2, 0.5):
        # Shares sum to 1, so that the largest is not quite that of independent ones; and counts are whole.
        assert 0.6 * level < float((p < level).double().mean()) < 1.3 * level


@pytest.mark.parametrize("concentration", [0.5, 2.0, 10.0])
def test_the_fit_finds_the_concentration(concentration: float) -> None:
    assert fit_concentration(_draw(concentration, 60)) == pytest.approx(concentration, rel=0.3)


def test_p_values_of_small_cases() -> None:
    # With a = b = 1 every count of 0 to 4 is as likely.
    one = [Largest(x / 4, 4, 1, 2).p_value(1.0) for x in range(5)]
    assert one == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert Largest(0.75, 4, 3, 2).p_value(1.0) == pytest.approx(1 - 0.6**3)
    # Evenly mixed, draws are independent: a binomial of 1/2.
    assert Largest(1.0, 10, 1, 2).p_value(1e9) == pytest.approx(2**-10, rel=1e-5)
    assert Largest(0.0, 10, 5, 3).p_value(2.0) == 1


def test_tails_far_below_rounding_are_kept() -> None:
    far = Largest(1.0, 1000, 10, 9).p_value(50.0)
    assert 0 < far < 1e-30


def test_the_critical_share_is_the_least_that_is_significant() -> None:
    one = Largest(0.3, 200, 10, 9)
    critical = one.critical(0.01, 3.0)
    at, below = (Largest(x, 200, 10, 9).p_value(3.0) for x in (critical, critical - 1 / 200))
    assert at < 0.01 <= below
    assert Largest(1.0, 3, 10, 9).critical(1e-9, 0.5) == math.inf


def test_times_even() -> None:
    assert Largest(0.5, 10, 5, 4).times_even == 2
