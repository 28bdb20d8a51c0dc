"""How far the versions of an operation may lie apart: one row per output dtype, each with its reason.

All versions compute in float32 (sums in float64 where the README says so) and round once, at the store. Results are of
order one: pixels in [0, 1], normalised inputs within about 4, cosine scores in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|a - b| <= atol + rtol * |b|, as in torch.testing.assert_close."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    torch.float32: Tolerance(
        rtol=4e-6,
        atol=2e-6,
        reason="other orders of summation, fused multiply-adds, and a product with 1/std in place of a division: a few "
        "units of 2^-23 each, and differences near zero keep the rounding of the order-one numbers they came from",
    ),
    torch.float16: Tolerance(
        rtol=2.0**-10 + 4e-6,
        atol=2e-6,
        reason="the float32 difference can cross a rounding boundary: one unit in the last place, at most 2^-10",
    ),
    torch.bfloat16: Tolerance(
        rtol=2.0**-7 + 4e-6,
        atol=2e-6,
        reason="as for float16: one unit in the last place is at most 2^-7 (Triton's interpreter truncates, too)",
    ),
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """The row of a dtype as keyword arguments for ``torch.testing.assert_close``."""
    row = TOLERANCES[dtype]
    return {"rtol": row.rtol, "atol": row.atol}
