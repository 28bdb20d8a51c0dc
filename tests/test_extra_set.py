from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.config import PurifyConfig
from pbe_fast.extra_set import first_of_each, initial_extra_set, judging_extra_set, next_extra_set, steady_images
from pbe_fast.ranking import Ranking

NONE = torch.zeros(4, dtype=torch.bool)
SECOND = torch.tensor([False, True, False, False])


def _scores(n: int, k: int = 4) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 3


def _ranking(distance: Tensor) -> Ranking:
    order = torch.sort(distance, stable=True).indices
    return Ranking(distance, order, int((~distance.isfinite()).sum()))


def test_the_paper_s_first_set_is_random() -> None:
    labels = torch.arange(200) % 4
    config = PurifyConfig(initial="random", fractions=(0.1,))
    first, again, other = (
        initial_extra_set(_scores(200), labels, NONE, config, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert len(first) == len(first.unique()) == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    hard = (F.cross_entropy(_scores(200), labels, reduction="none")[first] > 3).double().mean()
    assert hard < 0.9


@pytest.mark.parametrize("attracting", [NONE, SECOND])
@pytest.mark.parametrize(("fraction", "quantile"), [(0.1, 0.3), (0.3, 0.1), (0.14, 0.1), (0.004, 0.3)])
def test_the_first_set_comes_from_the_hardest_of_each_label_that_does_not_attract(
    attracting: Tensor, fraction: float, quantile: float
) -> None:
    # Of unequal classes, whose sizes a tenth does not divide.
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([14, 14, 54, 118]))
    scores = _scores(200)
    loss = F.cross_entropy(scores, labels, reduction="none")
    config = PurifyConfig(initial="hard", fractions=(fraction,), hard_quantile=quantile)
    chosen = initial_extra_set(scores, labels, attracting, config, torch.Generator().manual_seed(0))
    count = round(fraction * 200)
    trusted = 200 - 14 * int(attracting.sum())
    assert len(chosen) == len(chosen.unique()) == count
    for k in range(4):
        mine, taken = loss[labels == k], loss[chosen][labels[chosen] == k]
        if attracting[k]:
            assert len(taken) == 0
            continue
        allowed = math.ceil(max(count / trusted, quantile) * len(mine))
        assert (taken >= mine.sort(descending=True).values[allowed - 1]).all()
        if fraction >= 0.1 and k >= 2:
            assert len(taken) > 0


def test_the_first_set_is_drawn_from_the_hard_ones_not_simply_the_hardest() -> None:
    labels = torch.arange(200) % 4
    loss = F.cross_entropy(_scores(200), labels, reduction="none")
    config = PurifyConfig(initial="hard", fractions=(0.1,), hard_quantile=0.3)
    sets = [
        set(initial_extra_set(_scores(200), labels, NONE, config, torch.Generator().manual_seed(s)).tolist())
        for s in (0, 1)
    ]
    assert sets[0] != sets[1]
    assert set(loss.argsort(descending=True)[:20].tolist()) not in sets


def test_where_only_images_of_attracting_labels_are_left_they_have_to_do() -> None:
    labels = torch.ones(50, dtype=torch.int64)
    config = PurifyConfig(initial="hard", fractions=(0.2,))
    chosen = initial_extra_set(_scores(50), labels, SECOND, config, torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == 10


@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.7, 1.0])
def test_without_attracting_labels_the_next_set_is_the_top_of_the_ranking(fraction: float) -> None:
    ranking = _ranking(torch.rand(100, generator=torch.Generator().manual_seed(0)))
    chosen = next_extra_set(ranking, torch.arange(100) % 4, NONE, fraction)
    assert torch.equal(chosen, ranking.top(fraction))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_label_that_attracts_gives_the_top_of_its_better_part(fraction: float) -> None:
    labels = torch.arange(80) % 4
    distance = torch.rand(80, generator=torch.Generator().manual_seed(0)) * 0.1
    mine = (labels == 1).nonzero()[:, 0]
    distance[mine] += 0.5  # all of it forgotten a little
    distance[mine[5:]] += 0.5  # and 15 poisoned ones
    ranking = _ranking(distance)
    chosen = next_extra_set(ranking, labels, SECOND, fraction)
    of_others = [i for i in ranking.order.tolist() if labels[i] != 1]
    better = [i for i in ranking.order.tolist() if i in mine[:5].tolist()]
    expected = of_others[: round(fraction * 60)] + better[: max(1, round(fraction * 5))]
    assert chosen.tolist() == expected


def test_an_attracting_label_may_have_no_images_or_none_with_a_finite_distance() -> None:
    distance = torch.rand(30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    absent = torch.tensor([False, False, False, True])
    assert torch.equal(next_extra_set(_ranking(distance), labels, absent, 0.5), _ranking(distance).top(0.5))
    distance[labels == 1] = math.nan
    chosen = next_extra_set(_ranking(distance), labels, SECOND, 0.5)
    assert len(chosen) == 10
    assert not (labels[chosen] == 1).any()


def test_an_attracting_label_gives_only_images_that_the_purified_model_agrees_with() -> None:
    # Ten images of label 0, which attracts; the even ones are poisoned, and rank among the clean ones.
    labels = torch.zeros(10, dtype=torch.int64)
    distance = torch.tensor([0.01] * 5 + [0.2] * 5) + torch.arange(10) / 1e4
    ranking = Ranking(distance=distance, order=distance.argsort(), num_nonfinite=0)
    attracting = torch.tensor([True, False, False])
    agrees = torch.arange(10) % 2 == 1
    chosen = next_extra_set(ranking, labels, attracting, 1.0, agrees=agrees)
    assert set(chosen.tolist()) <= {1, 3, 5, 7, 9}
    assert len(chosen) == 2  # of the better half, 0 to 4
    none_agree = torch.zeros(10, dtype=torch.bool)
    assert len(next_extra_set(ranking, labels, attracting, 1.0, agrees=none_agree)) > 0


def test_of_a_label_that_changed_only_the_closest_are_taken_where_most_are_poisoned() -> None:
    # Of label 0 four fifths are poisoned, of all distances from 0.1 on.
    clean, poisoned = torch.linspace(0.01, 0.05, 20), torch.linspace(0.12, 0.6, 80)
    distance = torch.cat([clean, poisoned])
    labels = torch.zeros(100, dtype=torch.int64)
    first = torch.tensor([True, False])
    assert next_extra_set(_ranking(distance), labels, first, 1.0).max() > 40
    chosen = next_extra_set(_ranking(distance), labels, first, 1.0, changed=first)
    assert chosen.tolist() == list(range(20))
    assert torch.equal(
        next_extra_set(_ranking(distance), labels, first, 1.0, changed=~first),
        next_extra_set(_ranking(distance), labels, first, 1.0),
    )


def test_the_steady_set_is_what_small_changes_move_least() -> None:
    labels = torch.arange(400) % 4
    fragile = torch.rand(400, generator=torch.Generator().manual_seed(1))
    config = PurifyConfig(fractions=(0.1,), hard_quantile=0.01, steady_share=0.2)
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        chosen = initial_extra_set(_scores(400), labels, SECOND, config, generator, fragility=fragile)
        assert 40 <= len(chosen) == len(chosen.unique()) <= 42
        seen |= set(chosen.tolist())
    # A fifth of the three labels' 300 images, drawn at random and not by how hard they are.
    others = (labels != 1).nonzero()[:, 0]
    assert seen == set(others[fragile[others].argsort()[:60]].tolist())


def test_a_label_keeps_a_part_of_its_own() -> None:
    labels = torch.arange(100) // 50
    # The second label comes last.
    order = torch.arange(100)
    assert first_of_each(order, labels, 0.5, 0.0).tolist() == list(range(50))
    # A quarter of half of its fifty images, in place of the first label's last.
    assert first_of_each(order, labels, 0.5, 0.25).tolist() == [*range(43), *range(50, 57)]
    assert first_of_each(order, labels, 0.5, 1.0).tolist() == [*range(25), *range(50, 75)]
    # Of labels that are not in the order nothing is said.
    assert first_of_each(order[:50], labels, 0.1, 1.0).tolist() == list(range(5))


def test_the_floor_holds_for_every_set() -> None:
    labels = torch.arange(400) % 4
    # What is clean is of the first label, then of the second ...
    order = torch.cat([(labels == k).nonzero()[:, 0] for k in range(4)])
    values = torch.empty(400)
    values[order] = torch.arange(400) / 400
    config = PurifyConfig(fractions=(0.25,), steady_share=0.25, label_floor=0.2)
    generator = torch.Generator().manual_seed(0)
    first = initial_extra_set(_scores(400), labels, NONE, config, generator, fragility=values)
    following = next_extra_set(_ranking(values), labels, NONE, 0.25, floor=0.2)
    for chosen in (first, following):
        assert torch.bincount(labels[chosen], minlength=4).tolist() == [85, 5, 5, 5]
    assert torch.bincount(labels[next_extra_set(_ranking(values), labels, NONE, 0.25)], minlength=4).tolist()[
        1:
    ] == 3 * [0]


def test_all_but_the_most_fragile_are_steady_and_every_label_keeps_some() -> None:
    labels = torch.arange(400) % 4
    fragile = torch.rand(400, generator=torch.Generator().manual_seed(1))
    steady = steady_images(fragile, labels, PurifyConfig(fragile_share=0.3, label_floor=0.0))
    assert steady.sum() == 280 and fragile[steady].max() < fragile[~steady].min()
    assert steady_images(fragile, labels, PurifyConfig(fragile_share=0.0)).all()
    # All images of the last label are more fragile than any other: 0.5 of the 70 that would be its part.
    fragile[labels == 3] += 1
    steady = steady_images(fragile, labels, PurifyConfig(fragile_share=0.3, label_floor=0.5))
    assert steady.sum() == 280 and steady[labels == 3].sum() == 35


def test_what_is_judged_by_are_hard_ones_of_the_steady_half() -> None:
    labels = torch.arange(400) % 4
    fragile = torch.rand(400, generator=torch.Generator().manual_seed(1))
    config = PurifyConfig(fractions=(0.1,), hard_quantile=0.25)
    generator = torch.Generator().manual_seed(0)
    chosen = judging_extra_set(_scores(400), labels, SECOND, fragile, config, generator)
    assert len(chosen) == len(chosen.unique()) == 40
    others = (labels != 1).nonzero()[:, 0]
    steady = others[fragile[others].argsort()[:150]]
    assert set(chosen.tolist()) <= set(steady.tolist())
    # A quarter of all is half of the steady ones.
    loss = F.cross_entropy(_scores(400), labels, reduction="none")
    for k in (0, 2, 3):
        mine = steady[labels[steady] == k]
        least = loss[mine].sort(descending=True).values[math.ceil(0.5 * len(mine)) - 1]
        assert (loss[chosen][labels[chosen] == k] >= least).all()


def test_a_steady_set_as_large_as_everything() -> None:
    config = PurifyConfig(fractions=(1.0,))
    generator = torch.Generator().manual_seed(0)
    chosen = initial_extra_set(_scores(40), torch.arange(40) % 4, NONE, config, generator, fragility=torch.arange(40.0))
    assert len(chosen.unique()) == 40


@pytest.mark.parametrize("attracting", [NONE, SECOND])
def test_the_next_set_is_of_steady_images(attracting: Tensor) -> None:
    ranking = _ranking(torch.rand(100, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(100) % 4
    steady = torch.arange(100) % 5 != 0
    chosen = next_extra_set(ranking, labels, attracting, 0.5, steady=steady)
    assert steady[chosen].all()
    expected = [i for i in ranking.order.tolist() if steady[i] and not attracting[labels[i]]]
    assert chosen.tolist()[: len(expected) // 2] == expected[: len(expected) // 2]
    assert (len(chosen) == 40) == (not attracting.any())


@pytest.mark.parametrize("attracting", [NONE, SECOND])
def test_a_fragile_image_needs_its_rank_and_the_models_word(attracting: Tensor) -> None:
    distance = torch.rand(100, generator=torch.Generator().manual_seed(0))
    distance[20] = float("nan")
    ranking = _ranking(distance)
    labels = torch.arange(100) % 4
    steady = torch.arange(100) % 5 != 0
    agrees = torch.arange(100) % 3 != 0
    chosen = next_extra_set(ranking, labels, attracting, 0.5, agrees=agrees, steady=steady)
    others = ~attracting[labels]
    last = ranking.distance[chosen[steady[chosen] & others[chosen]]].max()
    taken = (~steady & agrees & others & (ranking.distance <= last)).nonzero()[:, 0]
    assert len(taken) > 2
    assert sorted(chosen[~steady[chosen]].tolist()) == taken.tolist()
    # They come on top: there are no fewer steady ones for it.
    without = next_extra_set(ranking, labels, attracting, 0.5, steady=steady)
    assert chosen[steady[chosen] & others[chosen]].tolist() == without[others[without]].tolist()
