"""Step 3: all training images ranked by how little the purification changed their logits (Eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbe_fast.kernels.cosine_rank import cosine_distance, rank
from pbe_fast.metrics import average_precision

# Of CIFAR-10's labels, benign ones lie below twice the median, the target at 12 times with a clean set, and at 5 times
# where it was left out, once at 2.3 (docs/recipe.md, sections 8 and 10).
_FAR = 3.0
# Of labels that are left out the target lies 3.4 to 4.9 times above the next (input-aware; SIG: 1.4 to 1.8), one of an
# all-to-all attack up to 1.8 times, by the images that the infected model is surest of (docs/recipe.md, section 8).
_AHEAD = 2.0
# Of fewer labels there is no telling which one stands out.
FEWEST_LABELS = 4


@dataclass(frozen=True, eq=False)
class Ranking:
    """The training set in the order of Eq. 9, likeliest clean first.

    Attributes:
        distance: (N,) float32, 1 - score, with full precision near 0: what is ranked by.
        order: (N,) int64, the images' indices by ascending distance; ties by index, non-finite rows last.
        num_nonfinite: Images whose logits held a NaN or an infinity.
    """

    distance: Tensor
    order: Tensor
    num_nonfinite: int

    @property
    def score(self) -> Tensor:
        """(N,) float32, the cosine of Eq. 9."""
        return 1 - self.distance

    def top(self, fraction: float) -> Tensor:
        """The first ``fraction`` of the ranking, at least one image; int64 indices in rank order."""
        return self.order[: max(1, round(fraction * len(self.order)))]

    def suspected(self) -> Tensor:
        """(N,) bool: the images beyond the threshold that splits the distances best in two (Otsu, 1979).

        No truth is asked: the threshold is the one with the largest variance between the two sides. Of a set without
        any poisoned image it still names some, those whose prediction the purification changed most. Images whose
        logits were not finite are suspected.
        """
        finite = self.distance.isfinite()
        return ~finite | (self.distance > otsu_threshold(self.distance[finite]))

    def ap_of_poisoned(self, poison_mask: Tensor) -> float:
        """Average precision with the poisoned images as positives, from the ranking's end (chance: their share)."""
        return average_precision(self.order.flip(0), poison_mask)

    def ap_of_clean(self, poison_mask: Tensor) -> float:
        """Average precision with the clean images as positives (chance: their share)."""
        return average_precision(self.order, ~poison_mask)


def otsu_threshold(values: Tensor) -> float:
    """The threshold that splits (N,) values into two sides with the largest variance between their means."""
    ordered = values.double().sort().values
    n = len(ordered)
    if n < 2:
        return float("inf")
    left = torch.arange(1, n, device=values.device, dtype=torch.float64)
    sums = ordered.cumsum(0)
    mean_left, mean_right = sums[:-1] / left, (sums[-1] - sums[:-1]) / (n - left)
    between = left * (n - left) * (mean_left - mean_right).square()
    return float(ordered[int(between.argmax())])


def label_distances(ranking: Ranking, labels: Tensor, num_classes: int, among: Tensor | None = None) -> Tensor:
    """The mean distance of each label's images.

    Args:
        ranking: Of N images.
        labels: (N,) int64, on the device of the ranking.
        num_classes: K.
        among: int64 indices of the images that count; all, if not given.

    Returns:
        (K,) float64 on the CPU; images whose distance is not finite do not count, and a label without others has 0.
    """
    distance = ranking.distance.double()
    if among is not None:
        labels, distance = labels[among], distance[among]
    labels, distance = labels[distance.isfinite()], distance[distance.isfinite()]
    sums = torch.bincount(labels, weights=distance, minlength=num_classes)
    return (sums / torch.bincount(labels, minlength=num_classes).clamp_min(1)).cpu()


def changed_labels(distances: Tensor) -> Tensor:
    """Labels that a purification without poisoned images changed far more than others, as poisoned images' labels do.

    Args:
        distances: (K,) of `label_distances`.

    Returns:
        (K,) bool: those above three times the median of the labels whose distance is not 0; none where these are fewer
        than four.
    """
    present = distances[distances > 0]
    if len(present) < FEWEST_LABELS:
        return torch.zeros_like(distances, dtype=torch.bool)
    return distances > _FAR * present.quantile(0.5)


def label_ahead(distances: Tensor) -> Tensor:
    """The label that changed more than twice as much as any other, as a target does of labels that are left out.

    Args:
        distances: (K,) of `label_distances`.

    Returns:
        (K,) bool, at most one of them True; none where fewer than four distances are not 0.
    """
    first, second = distances.topk(2).values.tolist()
    if int((distances > 0).sum()) < FEWEST_LABELS or first <= _AHEAD * second:
        return torch.zeros_like(distances, dtype=torch.bool)
    ahead: Tensor = distances >= first
    return ahead


def rank_images(infected_logits: Tensor, purified_logits: Tensor) -> Ranking:
    """Ranks images by the logits that the infected and the purified model give them, both (N, K)."""
    return rank_distances(cosine_distance(infected_logits, purified_logits))


def rank_distances(distance: Tensor) -> Ranking:
    """Ranks images by their distances, (N,) float32: the nearest first, ties by index, those not finite last."""
    ranked = rank(distance)
    return Ranking(distance=distance, order=ranked.indices, num_nonfinite=ranked.num_nonfinite)


def rank_over_rounds(
    so_far: tuple[Ranking, Tensor], now: tuple[Ranking, Tensor], remembered: Tensor
) -> tuple[Ranking, Tensor]:
    """The ranking of the last round, in which some images keep what earlier rounds said of them.

    Args:
        so_far: The ranking of the rounds before, and (N,) bool, where the purified models agreed with the label.
        now: Those of the last round alone.
        remembered: (N,) bool. Such an image ranks by its largest distance, and every model has to agree.

    Returns:
        Both, of all rounds.
    """
    distance = torch.where(remembered, so_far[0].distance.maximum(now[0].distance), now[0].distance)
    return rank_distances(distance), now[1] & (so_far[1] | ~remembered)


def poisoned_share(indices: Tensor, poison_mask: Tensor) -> float:
    """The fraction of the images at ``indices`` that is poisoned."""
    return float(poison_mask[indices].double().mean()) if len(indices) else float("nan")
