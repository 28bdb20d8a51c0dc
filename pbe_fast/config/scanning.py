"""Options of a scan."""

from __future__ import annotations

from dataclasses import dataclass

from pbe_fast.config.steps import check_radius
from pbe_fast.options import check, check_types, option

# Sides of windows that a scan is calibrated for, as shares of the image's.
CALIBRATED_WINDOWS = (0.125, 0.25)


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Looking for a backdoor (`pbe_fast.scan`). Sizes are in pixel units of [0, 1]."""

    norm: str = option("linf", "norm of the ball", ("linf", "l2"))
    eps: tuple[float, ...] = option(
        tuple(level / 255 for level in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        "radii of the ball, rising; three of them are tested, by how many images they move",
    )
    patch_windows: tuple[float, ...] = option(
        CALIBRATED_WINDOWS,
        "sides of windows, as shares of the image's: the attack changes a random one of each image at will, which is "
        "the way to a patch; each is one more test for all-to-one (none: no such test)",
    )
    waves: bool = option(
        True,
        "try all slow waves one by one, the way to a trigger that is spread over all pixels; each setting is one more "
        "test (of 64 images and eight labels or more, for one label of pictures of 32 pixels or more)",
    )
    steps: int = option(5, "number of steps, each of a quarter of eps")
    images: int = option(500, "images to attack, at most; of more classes than half as many two of each")
    significance: float = option(0.01, "p-value below which a backdoor is reported")

    def __post_init__(self) -> None:
        check_types(self)
        check(self.norm in ("linf", "l2"), "norm", self.norm, "linf, l2")
        check(len(self.eps) >= 1, "eps", self.eps, "at least one radius")
        for eps in self.eps:
            check_radius(self.norm, eps)
        check(list(self.eps) == sorted(set(self.eps)), "eps", self.eps, "rising")
        # Of other windows nobody knows how uneven benign models are.
        known = set(self.patch_windows) <= set(CALIBRATED_WINDOWS)
        once = len(set(self.patch_windows)) == len(self.patch_windows)
        accepted = f"of {', '.join(map(str, CALIBRATED_WINDOWS))}, each once, or none"
        check(known and once, "patch_windows", self.patch_windows, accepted)
        check(self.steps >= 1, "steps", self.steps, "1 or more")
        check(self.images >= 1, "images", self.images, "1 or more")
        check(0 < self.significance < 1, "significance", self.significance, "between 0 and 1")
