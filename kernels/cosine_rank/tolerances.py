"""How far each version's distance may lie from the exact one: |d - exact| <= rtol d + root sqrt(d) + atol."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DistanceTolerance:
    """One version's row; the table of the other operations has no term in sqrt(d), which near 0 is what matters."""

    rtol: float
    root: float
    atol: float
    reason: str

    def of(self, exact: Tensor) -> Tensor:
        """The largest error allowed at each exact distance."""
        return self.rtol * exact + self.root * exact.sqrt() + self.atol


_ROUNDED_ONCE = 2.0**-23

TOLERANCES = {
    "reference": DistanceTolerance(_ROUNDED_ONCE, 1e-15, 1e-18, "float64 throughout, rounded to float32 once"),
    "native": DistanceTolerance(
        _ROUNDED_ONCE,
        0.0,
        2e-14,
        "the cancellation in 1 - cos leaves the rounding of float64 sums, 1e-16 times a small multiple of sqrt(K)",
    ),
    "triton": DistanceTolerance(
        4e-6,
        0.0,
        1e-12,
        "float32: inverse norms off by e1 and e2 (below 1e-6) stretch d by 1 + e1 + e2 and add (e1 - e2)^2 / 2",
    ),
    "interpreter": DistanceTolerance(
        4e-6,
        2.0**-21,
        1e-12,
        "as triton, but its fma rounds twice: an error of 2^-24 in both unit vectors, met by a difference of sqrt(2 d)",
    ),
}
