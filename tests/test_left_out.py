"""Where no label attracts the attack: half of the labels is left out in turn, to find the one that changes."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from quarters import QUICK, infect, run, watch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attack import InfectedModel
from pbe_fast.engine.forward import predict_logits
from pbe_fast.extra_set import next_extra_set
from pbe_fast.purify import purify
from pbe_fast.ranking import Ranking, label_distances, rank_images
from pbe_fast.rounds import Run


@pytest.fixture(scope="module")
def infected() -> InfectedModel:
    return infect()


@pytest.fixture(scope="module")
def of_eight() -> InfectedModel:
    """The same with eight labels: the quarter that is bright, and how bright."""
    return infect(classes=8)


def test_half_of_the_labels_is_left_out_in_turn_and_then_the_one_that_changed(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def sixth(distances: Tensor) -> Tensor:
        asked.append(distances)
        return torch.arange(8) == 6 if (distances > 0)[6] else torch.zeros(8, dtype=torch.bool)

    seen = watch(monkeypatch, of_eight, attracting=[], changed=sixth)
    result = run(of_eight.model, of_eight.train_data, initial="steady")
    assert seen.left_out == [[0, 2, 4, 6], [1, 3, 5, 7], [6]]
    # Each half is judged by the images left out, and no others.
    assert [(distances > 0).nonzero()[:, 0].tolist() for distances in asked[:2]] == seen.left_out[:2]
    assert all(entry["labels_apart"] == [6] for entry in result.history)
    assert [entry["round"] for entry in result.history] == [0, 1, 2]
    # No set keeps to steady images once a label is found; the infected model teaches as long as one is left out.
    assert seen.fragile == [False] and seen.steady == [False, False]
    assert seen.taught == ["right", "right", "right", None, None]
    assert seen.unchanged_at_start == [True, True, True, False, False]
    # What it takes is told apart from the rounds.
    for phase in ("adversarial", "clean", "ranking"):
        assert result.seconds[f"labels left out: {phase}"] > 0
        assert result.seconds[phase] == pytest.approx(sum(entry["seconds"][phase] for entry in result.history))


@pytest.mark.parametrize(("found", "taught"), [([], None), ([2, 5], "right")])
def test_steady_images_stay_the_way_unless_it_is_one_label(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, found: list[int], taught: str | None
) -> None:
    def changed(distances: Tensor) -> Tensor:
        return torch.tensor([k in found for k in range(8)]) & (distances > 0)

    seen = watch(monkeypatch, of_eight, attracting=[], changed=changed)
    run(of_eight.model, of_eight.train_data, initial="steady")
    # Nothing found, the halves are judged again, with the infected model heeded everywhere.
    judged = ["right", "right"] if found else ["right", "right", "all", "all"]
    assert seen.left_out == [[0, 2, 4, 6], [1, 3, 5, 7]] * (len(judged) // 2) + [found]
    assert seen.fragile == [True] and seen.steady == [True, True]
    assert seen.taught == [*judged, taught, None, None]


def test_labels_without_images_are_in_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = infect(classes=8, names="abcdefghij")
    seen = watch(monkeypatch, wider, attracting=[])
    run(wider.model, wider.train_data, initial="steady")
    assert seen.left_out[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_of_few_labels_none_is_left_out(infected: InfectedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch, infected, attracting=[])
    result = run(infected.model, infected.train_data, initial="steady")
    assert seen.left_out == [[]] and seen.fragile == [True] and seen.taught == [None] * 3
    assert not any(phase.startswith("labels left out") for phase in result.seconds)


def test_of_a_label_that_changed_an_image_has_to_rank_clean_after_every_round(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_round: list[Tensor] = []
    agreed: list[Tensor] = []
    asked: list[tuple[Tensor, Tensor]] = []
    told: list[Tensor] = []
    rank = Run._rank

    def ranked(self: Run, *arguments: Any) -> tuple[Ranking, Tensor]:
        ranking, _ = rank(self, *arguments)
        # Made up: of so few images hardly one is judged otherwise by a later round.
        agrees = torch.rand(len(ranking.order), generator=torch.Generator().manual_seed(len(agreed))) < 0.7
        by_round.append(ranking.distance)
        agreed.append(agrees)
        return ranking, agrees

    def chosen(ranking: Ranking, *arguments: Any, **keywords: Any) -> Tensor:
        asked.append((ranking.distance, keywords["agrees"]))
        assert keywords["changed"].tolist() == [k == 2 for k in range(8)]
        return next_extra_set(ranking, *arguments, **keywords)

    def look(t: int, model: nn.Module, ranking: Ranking | None) -> None:
        assert ranking is not None
        told.append(ranking.distance)

    watch(monkeypatch, of_eight, attracting=[], changed=lambda distances: torch.arange(8) == 2)
    monkeypatch.setattr(Run, "_rank", ranked)
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    config = dataclasses.replace(QUICK, initial="steady")
    data, mask = of_eight.train_data, of_eight.train_data.poison_mask
    result = purify(of_eight.model, data, config=config, device="cpu", precision="fp32", progress=False, on_round=look)
    by_round, agreed = by_round[2:], agreed[2:]  # after those without half of the labels
    target = data.labels == 2
    expected = [torch.where(target, torch.stack(by_round[: t + 1]).amax(0), by_round[t]) for t in range(3)]
    assert any(not torch.equal(a, b) for a, b in zip(expected, by_round, strict=True)), "or this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(told, expected, strict=True))
    (first, agrees), (second, agrees_later) = asked
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert torch.equal(agrees, agreed[0])
    assert torch.equal(agrees_later, torch.where(target, agreed[0] & agreed[1], agreed[1]))
    assert result.ranking is not None and torch.equal(result.ranking.distance, expected[2])
    assert torch.equal(result.ranking.order, expected[2].argsort(stable=True))
    assert mask is not None and result.history[-1]["ap_of_poisoned"] == result.ranking.ap_of_poisoned(mask)


def test_where_a_label_attracts_every_round_goes_by_its_own_ranking(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def chosen(*arguments: Any, **keywords: Any) -> Tensor:
        asked.append(keywords["changed"])
        return next_extra_set(*arguments, **keywords)

    seen = watch(monkeypatch, infected, attracting=[1, 3], changed=lambda distances: torch.arange(4) == 1)
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    result = run(infected.model, infected.train_data, initial="steady")
    assert seen.left_out == [[1, 3]] and seen.fragile == [False] and seen.taught == ["right", None, None]
    assert all(entry["labels_apart"] == [1, 3] for entry in result.history)
    assert not any(changed.any() for changed in asked)
    expected = rank_images(*(predict_logits(m, infected.train_data.images) for m in (infected.model, result.model)))
    assert result.ranking is not None
    torch.testing.assert_close(result.ranking.distance, expected.distance, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [{"leave_out": False}, {"initial": "hard"}, {"initial": "random"}])
def test_no_label_is_left_out_where_that_is_not_asked_for(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen = watch(monkeypatch, of_eight, attracting=[])
    result = run(of_eight.model, of_eight.train_data, **{"initial": "steady", **options})
    assert seen.left_out == [[]]
    assert not any(phase.startswith("labels left out") for phase in result.seconds)


def test_a_half_is_judged_by_the_images_that_the_infected_model_is_surest_of(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor | None] = []

    def distances(*arguments: Any, among: Tensor | None = None) -> Tensor:
        asked.append(among)
        return label_distances(*arguments, among)

    watch(monkeypatch, of_eight, attracting=[])
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "label_distances", distances)
    data = of_eight.train_data
    run(of_eight.model, data, initial="steady")
    loss = F.cross_entropy(predict_logits(of_eight.model, data.images), data.labels, reduction="none")
    assert len(asked) == 4
    for among in asked:
        assert among is not None
        for k in range(8):
            mine = data.labels == k
            surest = loss[among[data.labels[among] == k]]
            assert len(surest) == math.ceil(0.1 * int(mine.sum()))
            assert surest.sum() <= loss[mine].sort().values[: len(surest)].sum() + 1e-4
