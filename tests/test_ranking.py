from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from pbe_fast.ranking import (
    Ranking,
    changed_labels,
    label_ahead,
    label_distances,
    otsu_threshold,
    poisoned_share,
    rank_images,
)


def _logits(n: int = 40, k: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def _ranking(distance: list[float]) -> Ranking:
    values = torch.tensor(distance)
    order = sorted(range(len(distance)), key=lambda i: (not math.isfinite(distance[i]), distance[i], i))
    return Ranking(values, torch.tensor(order), int((~values.isfinite()).sum()))


def test_the_score_is_the_cosine_of_the_two_logit_vectors() -> None:
    a, b = _logits(seed=0), _logits(seed=1)
    ranking = rank_images(a, b)
    cosine = torch.tensor(
        [
            sum(x * y for x, y in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q)
            for p, q in zip(a.tolist(), b.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(ranking.score, cosine, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ranking.distance, 1 - cosine, atol=1e-6, rtol=1e-5)
    assert torch.equal(ranking.order, cosine.argsort(descending=True))
    assert ranking.num_nonfinite == 0


def test_images_whose_logits_turned_come_last() -> None:
    infected = _logits()
    purified = infected * torch.rand(40, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    turned = torch.tensor([3, 17, 31])
    purified[turned] = infected[turned].flip(1)
    ranking = rank_images(infected, purified)
    assert set(ranking.order[-3:].tolist()) == set(turned.tolist())
    assert ranking.suspected().nonzero()[:, 0].tolist() == turned.tolist()


def test_logits_that_are_not_finite_rank_last_and_are_suspected() -> None:
    infected, purified = _logits(), _logits() + 0.01 * _logits(seed=1)
    purified[5, 2] = math.nan
    infected[9, 0] = math.inf
    ranking = rank_images(infected, purified)
    assert ranking.order[-2:].tolist() == [5, 9]
    assert ranking.num_nonfinite == 2
    assert ranking.suspected()[[5, 9]].all()


def test_ties_go_by_index() -> None:
    logits = _logits()
    assert rank_images(logits, logits).order.tolist() == list(range(40))


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 1), (0.25, 2), (0.5, 5), (0.74, 7), (1.0, 10), (0.001, 1)])
def test_top_is_the_beginning_of_the_ranking(fraction: float, count: int) -> None:
    ranking = _ranking([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5, 0.0])
    assert ranking.top(fraction).tolist() == [9, 1, 3, 5, 7, 8, 6, 4, 2, 0][:count]


def test_average_precision_of_both_kinds_equals_sklearn_s() -> None:
    generator = torch.Generator().manual_seed(0)
    poisoned = torch.rand(300, generator=generator) < 0.1
    distance = torch.rand(300, generator=generator) + 0.5 * poisoned
    ranking = Ranking(distance, distance.argsort(), 0)
    assert ranking.ap_of_poisoned(poisoned) == pytest.approx(average_precision_score(poisoned, distance))
    assert ranking.ap_of_clean(poisoned) == pytest.approx(average_precision_score(~poisoned, -distance))
    assert ranking.ap_of_poisoned(poisoned) > 0.2
    assert ranking.ap_of_clean(poisoned) > 0.95


def _otsu_by_brute_force(values: list[float]) -> tuple[float, float]:
    """The best threshold out of all values, and the variance between the two sides that it gives."""
    best, where = -1.0, math.nan
    for threshold in sorted(values):
        left, right = [v for v in values if v <= threshold], [v for v in values if v > threshold]
        if right:
            mean_left, mean_right = math.fsum(left) / len(left), math.fsum(right) / len(right)
            between = len(left) * len(right) * (mean_left - mean_right) ** 2
            if between > best:
                best, where = between, threshold
    return where, best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [1, 6])
def test_otsu_s_threshold_is_the_best_of_all(seed: int, digits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.rand(30, generator=generator) * 0.4, 0.5 + torch.rand(7, generator=generator)])
    values = (values * 10**digits).round() / 10**digits  # one digit makes many ties
    expected, _ = _otsu_by_brute_force(values.tolist())
    assert otsu_threshold(values) == pytest.approx(expected)


def test_suspected_are_those_above_the_threshold_only() -> None:
    ranking = _ranking([0.1, 0.9, 0.11, 0.95, 0.1, math.nan, 0.12])
    assert ranking.suspected().tolist() == [False, True, False, True, False, True, False]


def test_nothing_is_suspected_where_nothing_changed() -> None:
    assert not _ranking([0.25] * 5).suspected().any()
    assert not _ranking([0.25]).suspected().any()


def test_all_are_suspected_where_nothing_is_finite() -> None:
    assert _ranking([math.nan, math.inf]).suspected().all()


def test_poisoned_share() -> None:
    mask = torch.tensor([True, False, False, True])
    assert poisoned_share(torch.tensor([0, 1, 2]), mask) == pytest.approx(1 / 3)
    assert math.isnan(poisoned_share(torch.tensor([], dtype=torch.int64), mask))


def test_the_mean_distance_of_each_label() -> None:
    ranking = _ranking([0.1, 0.3, 0.5, math.inf, 0.2])
    labels = torch.tensor([0, 0, 2, 2, 3])
    assert label_distances(ranking, labels, 5).tolist() == pytest.approx([0.2, 0.0, 0.5, 0.2, 0.0])
    among = torch.tensor([0, 4, 3])
    assert label_distances(ranking, labels, 5, among).tolist() == pytest.approx([0.1, 0.0, 0.0, 0.2, 0.0])


@pytest.mark.parametrize(
    ("distances", "changed"),
    [
        ([0.40, 0.02, 0.03, 0.02, 0.02], [0]),
        ([0.05, 0.02, 0.03, 0.02, 0.02], []),
        ([0.40, 0.02, 0.03, 0.35, 0.02], [0, 3]),
        # Labels without images say nothing of the others, and are not named.
        ([0.40, 0.02, 0.0, 0.02, 0.03, 0.0, 0.0], [0]),
        # Of three there is no telling.
        ([0.40, 0.02, 0.02], []),
        ([0.0, 0.0], []),
        ([], []),
    ],
)
def test_labels_that_changed_far_more_than_others(distances: list[float], changed: list[int]) -> None:
    assert changed_labels(torch.tensor(distances, dtype=torch.float64)).nonzero()[:, 0].tolist() == changed


def test_one_label_may_be_far_ahead_of_all_others() -> None:
    def ahead(*distances: float) -> list[int]:
        return label_ahead(torch.tensor(distances)).nonzero()[:, 0].tolist()

    assert ahead(0.281, 0, 0.119, 0, 0.076, 0, 0.118, 0, 0.083, 0) == [0]
    assert ahead(0.240, 0, 0.175, 0, 0.112, 0, 0.179, 0, 0.135, 0) == []
    assert ahead(0.1, 0.1, 0.5, 0.5) == [] and ahead(0.5, 0.1, 0.1, 0) == []
