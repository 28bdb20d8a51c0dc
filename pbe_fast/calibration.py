"""How uneven a benign model's adversarial labels are, and so how surprising a share is.

The paper takes them to be uniform. They are not: some labels lie nearer to all others, so that shares differ from model
to model far more than those of independent draws would. The null hypothesis is therefore Dirichlet-multinomial: the
shares of m destinations are drawn from a symmetric Dirichlet distribution, whose concentration is fitted on benign
models (`bench/efficacy/scan_models.py`), and the images from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Of 0.1 to 1000, in decades; beyond that shares are all but free, or all but multinomial.
_DECADES = (-1.0, 3.0)
LEAST_REPRESENTED = 0.5
_EULER = 0.5772156649015329

# Concentrations of benign models, by setting and level: `python bench/efficacy/scan_models.py fit`. What is not here is
# not tested: in windows, the shifts of benign digits models say nothing of photographs and signs (docs/scan.md).
CONCENTRATION: dict[tuple[str, str | None], float] = {
    ("all_to_all", "beyond"): 9.42,
    ("all_to_all", "most"): 5.40,
    ("all_to_all", "quarter"): 4.40,
    ("all_to_one", "beyond"): 1.16,
    ("all_to_one", "most"): 2.65,
    ("all_to_one", "patch 1/4"): 0.88,
    ("all_to_one", "patch 1/8"): 2.83,
    ("all_to_one", "quarter"): 2.74,
}

# Location and scale of the Gumbel distribution of how far the label (or shift) that slow waves lead to most is ahead of
# the next (`python bench/efficacy/scan_waves.py fit`). Of labels on photographs and signs alone: strokes are waves, and
# digits models are led by them to one label or another.
WAVES: dict[str, tuple[float, float]] = {"all_to_one": (0.054, 0.056), "all_to_all": (0.011, 0.010)}


def wave_p_value(setting: str, ahead: float) -> float:
    """How often that of a benign model is as far ahead."""
    location, scale = WAVES[setting]
    return -math.expm1(-math.exp((location - ahead) / scale))


def wave_critical(setting: str, significance: float) -> float:
    """How far it has to be ahead for a p-value of ``significance``."""
    location, scale = WAVES[setting]
    return location - scale * math.log(-math.log1p(-significance))


def fit_waves(ahead: Iterable[float]) -> tuple[float, float]:
    """Location and scale by the method of moments, of at least two models."""
    values = torch.tensor(list(ahead), dtype=torch.float64)
    scale = float(values.std()) * math.sqrt(6) / math.pi
    return float(values.mean()) - _EULER * scale, scale


@dataclass(frozen=True)
class Largest:
    """The largest of a few shares.

    Attributes:
        share: In [0, 1].
        total: Images that it is a share of.
        candidates: Shares that were looked at.
        destinations: Labels that each image can reach, at least 2.
        represented: How many of the labels that could have misled images have some, as a share. Each label's images
            count as one vote; the fewer vote, the more uneven is their mean.
    """

    share: float
    total: int
    candidates: int
    destinations: int
    represented: float = 1.0

    @property
    def times_even(self) -> float:
        """The share in units of what it would be if all destinations were alike."""
        return self.share * self.destinations

    def p_value(self, concentration: float) -> float:
        """P(a largest share of this or more) under the null, by Sidak's formula for the candidates.

        1 where fewer than half of the labels vote: of a few labels nobody knows how uneven they may be.
        """
        if self.represented < LEAST_REPRESENTED:
            return 1.0
        return float(_any_of(self.candidates, self.log_upper(concentration)[round(self.share * self.total)]))

    def critical(self, significance: float, concentration: float) -> float:
        """The least share whose p-value is below ``significance``; infinite where none is."""
        if self.represented < LEAST_REPRESENTED:
            return math.inf
        upper = self.log_upper(concentration)
        below = (_any_of(self.candidates, upper) < significance).nonzero()
        return float(below[0, 0]) / self.total if len(below) else math.inf

    def log_upper(self, concentration: float) -> Tensor:
        """log P(one given share is x / total or more), x of 0 to ``total``, for the concentration of all labels."""
        return _log_upper(self.total, self.destinations, concentration * self.represented)


def fit_concentration(largest: Iterable[Largest]) -> float:
    """The concentration under which the largest shares of benign models are most likely, from 0.1 to 1000.

    The likelihood is that of the maximum, not of all shares: a test needs the tail.
    """
    seen = list(largest)

    def likelihood(decade: float) -> float:
        return sum(_log_likelihood(one, 10**decade) for one in seen)

    low, high = _DECADES
    while high - low > 1e-3:
        # It rises to one maximum and falls: a third that cannot hold it goes.
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if likelihood(left) < likelihood(right) else (low, right)
    return float(10 ** ((low + high) / 2))


def _log_likelihood(largest: Largest, concentration: float) -> float:
    """log P(the largest share is exactly this one)."""
    upper = _any_of(largest.candidates, largest.log_upper(concentration))
    here = round(largest.share * largest.total)
    beyond = float(upper[here + 1]) if here < largest.total else 0.0
    return math.log(max(float(upper[here]) - beyond, 1e-300))


def _any_of(candidates: int, log_upper: Tensor) -> Tensor:
    """P(at least one of ``candidates`` independent events), each of log probability ``log_upper``."""
    # expm1 and log1p: 1 - (1 - p)^n would be 0 for the small p that matter.
    return -torch.expm1(candidates * torch.log1p(-log_upper.exp().clamp_max(1.0)))


def _log_upper(total: int, destinations: int, concentration: float) -> Tensor:
    """log P(X >= x) for x of 0 to ``total``, (total + 1,) float64.

    X of ``total`` images reach one given destination: beta-binomial with parameters a = ``concentration`` and
    b = (destinations - 1) a.
    """
    x = torch.arange(total + 1, dtype=torch.float64)
    a = torch.tensor(concentration, dtype=torch.float64)
    b = (destinations - 1) * a
    choose = torch.lgamma(x.new_tensor(total + 1)) - torch.lgamma(x + 1) - torch.lgamma(total - x + 1)
    log_pmf = choose + _log_beta(x + a, total - x + b) - _log_beta(a, b)
    return torch.logcumsumexp(log_pmf.flip(0), dim=0).flip(0).clamp_max(0.0)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
