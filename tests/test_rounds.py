"""Which rounds there are, what each learns from, and what is told of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quarters import QUICK, infect, logits, quarters, run
from torch import Tensor, nn

from pbe_fast.attack import InfectedModel
from pbe_fast.engine.forward import predict_logits
from pbe_fast.extra_set import initial_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner
from pbe_fast.purify import purify
from pbe_fast.ranking import poisoned_share, rank_images


@pytest.fixture(scope="module")
def infected() -> InfectedModel:
    return infect()


# Without a clean set


def test_every_round_of_algorithm_1_is_in_the_history(infected: InfectedModel) -> None:
    result = run(infected.model, infected.train_data)
    assert [e["round"] for e in result.history] == [0, 1, 2]
    assert [e["extra_set_size"] for e in result.history] == [16, 40, 80]
    for entry in result.history:
        assert math.isfinite(entry["adversarial_loss"])
        assert math.isfinite(entry["clean_loss"])
        assert entry["seconds"].keys() == {"adversarial", "clean", "ranking"}
        assert all(seconds > 0 for seconds in entry["seconds"].values())
        assert 0 < entry["ap_of_poisoned"] <= 1
        assert 0 < entry["ap_of_clean"] <= 1
        assert 0 <= entry["extra_set_poison_rate"] <= 1
    json.dumps(result.history, allow_nan=False)
    for phase in ("adversarial", "clean", "ranking"):
        assert result.seconds[phase] == pytest.approx(sum(entry["seconds"][phase] for entry in result.history))
    assert result.config.fractions == (0.1, 0.25, 0.5)
    assert result.precision == "float32"
    assert result.train_data is not None


@pytest.mark.parametrize("mask", [None, torch.zeros(160, dtype=torch.bool)])
def test_where_the_truth_is_not_known_nothing_is_said_of_it(infected: InfectedModel, mask: Tensor | None) -> None:
    unknown = dataclasses.replace(infected.train_data, poison_mask=mask, true_labels=None)
    result = run(infected.model, unknown)
    known = {"ap_of_poisoned", "ap_of_clean", "extra_set_poison_rate"}
    assert all(not known & set(entry) for entry in result.history)


def test_the_algorithm_does_not_look_at_the_truth(infected: InfectedModel) -> None:
    blind = dataclasses.replace(infected.train_data, poison_mask=None, true_labels=None)
    seeing = run(infected.model, infected.train_data)
    assert torch.equal(logits(run(infected.model, blind).model), logits(seeing.model))


def test_the_ranking_is_by_eq_9_against_the_infected_model(infected: InfectedModel) -> None:
    result = run(infected.model, infected.train_data)
    images = infected.train_data.images
    expected = rank_images(predict_logits(infected.model, images), predict_logits(result.model, images))
    assert result.ranking is not None
    torch.testing.assert_close(result.ranking.distance, expected.distance, atol=1e-6, rtol=1e-3)
    assert torch.equal(result.suspected(), result.ranking.suspected())


def test_the_next_extra_set_is_the_top_of_the_ranking(infected: InfectedModel) -> None:
    mask = infected.train_data.poison_mask
    assert mask is not None
    first = run(infected.model, infected.train_data, fractions=(0.25,))
    assert first.ranking is not None
    shares = []
    for fraction in (0.3, 0.6, 1.0):
        both = run(infected.model, infected.train_data, fractions=(0.25, fraction))
        assert both.history[0]["extra_set_poison_rate"] == first.history[0]["extra_set_poison_rate"]
        assert both.history[1]["extra_set_poison_rate"] == poisoned_share(first.ranking.top(fraction), mask)
        shares.append(both.history[1]["extra_set_poison_rate"])
    assert shares[2] == 0.1


@pytest.mark.parametrize(("steps", "epochs", "per_round"), [(3, 1, [3, 3, 3]), (3, 2, [3, 4, 6]), (0, 0, [0, 0, 0])])
def test_the_number_of_updates(infected: InfectedModel, steps: int, epochs: int, per_round: list[int]) -> None:
    # Batches of 32: the extra sets of 16, 40 and 80 images make 1, 2 and 3.
    before = int(infected.model.get_buffer("1.num_batches_tracked"))
    result = run(infected.model, infected.train_data, clean_steps=steps, clean_epochs=epochs)
    made = int(result.model.get_buffer("1.num_batches_tracked")) - before
    assert made == 3 * 7 + sum(per_round)


def test_whoever_looks_on_sees_every_round_and_changes_nothing(infected: InfectedModel) -> None:
    seen: list[tuple[int, dict[str, Tensor], Any]] = []

    def look(t: int, model: nn.Module, ranking: Any) -> str:
        assert not model.training
        seen.append((t, copy.deepcopy(model.state_dict()), ranking))
        torch.rand(100)
        for parameter in model.parameters():
            parameter.data.zero_()
        return "ignored"

    options: dict[str, Any] = {"config": QUICK, "device": "cpu", "progress": False}
    watched = purify(infected.model, infected.train_data, on_round=look, **options)
    alone = purify(infected.model, infected.train_data, **options)
    assert [t for t, _, _ in seen] == [0, 1, 2]
    assert [r.ap_of_poisoned(infected.train_data.poison_mask) for _, _, r in seen] == [
        entry["ap_of_poisoned"] for entry in watched.history
    ]
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name])
        assert torch.equal(value, seen[-1][1][name])
    seen.clear()
    purify(infected.model, clean_data=infected.train_data, on_round=look, **options)
    assert [(t, ranking) for t, _, ranking in seen] == [(0, None)]


def test_the_infected_model_sees_the_training_set_once_per_run(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[bool, int]] = []

    def watched(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
        shown.append((next(model.parameters()).requires_grad, len(images)))
        return predict_logits(model, images, **options)

    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "predict_logits", watched)
    run(infected.model, infected.train_data)
    # The infected model is the one that never trains.
    assert shown == [(False, 160), (True, 160), (True, 160), (True, 160)]


# Where no label attracts


@dataclasses.dataclass
class Seen:
    """What the parts of a run were asked."""

    left_out: list[list[int]] = dataclasses.field(default_factory=list)
    fragile: list[bool] = dataclasses.field(default_factory=list)
    steady: list[bool] = dataclasses.field(default_factory=list)
    taught: list[bool] = dataclasses.field(default_factory=list)
    unchanged_at_start: list[bool] = dataclasses.field(default_factory=list)


def _watch(
    monkeypatch: pytest.MonkeyPatch,
    infected: InfectedModel,
    *,
    attracting: list[int],
    changed: Callable[[Tensor], Tensor] | None = None,
) -> Seen:
    """Watches a run in which the attack leads to given labels."""
    seen = Seen()
    rounds, restart = sys.modules["pbe_fast.rounds"], FineTuner.restart

    def first(*arguments: Any, **keywords: Any) -> Tensor:
        seen.left_out.append(arguments[2].nonzero()[:, 0].tolist())
        seen.fragile.append(keywords["fragility"] is not None)
        return initial_extra_set(*arguments, **keywords)

    def following(*arguments: Any, **keywords: Any) -> Tensor:
        seen.steady.append(keywords["steady"] is not None)
        return next_extra_set(*arguments, **keywords)

    def restarted(self: FineTuner, **keywords: Any) -> None:
        if keywords["total_steps"] > 1:  # a round, not the making of the tuner
            seen.taught.append(keywords["teacher"] is not None)
            state = infected.model.state_dict()
            same = all(torch.equal(value, state[name]) for name, value in self._model.state_dict().items())
            seen.unchanged_at_start.append(same)
        restart(self, **keywords)

    classes = infected.train_data.num_classes
    monkeypatch.setattr(
        rounds, "attracting_labels", lambda counts: torch.tensor([k in attracting for k in range(classes)])
    )
    monkeypatch.setattr(rounds, "initial_extra_set", first)
    monkeypatch.setattr(rounds, "next_extra_set", following)
    monkeypatch.setattr(FineTuner, "restart", restarted)
    if changed is not None:
        monkeypatch.setattr(rounds, "changed_labels", changed)
    return seen


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

    seen = _watch(monkeypatch, of_eight, attracting=[], changed=sixth)
    result = run(of_eight.model, of_eight.train_data, initial="steady")
    assert seen.left_out == [[0, 2, 4, 6], [1, 3, 5, 7], [6]]
    # Each half is judged by the images left out, and no others.
    assert [(distances > 0).nonzero()[:, 0].tolist() for distances in asked[:2]] == seen.left_out[:2]
    assert all(entry["labels_apart"] == [6] for entry in result.history)
    assert [entry["round"] for entry in result.history] == [0, 1, 2]
    # Steady images are the way until a label is found; the infected model teaches as long as one is left out.
    assert seen.fragile == [True, True, False] and seen.steady == [False, False]
    assert seen.taught == [True, True, True, False, False]
    assert seen.unchanged_at_start == [True, True, True, False, False]
    # What it takes is told apart from the rounds.
    for phase in ("adversarial", "clean", "ranking"):
        assert result.seconds[f"labels left out: {phase}"] > 0
        assert result.seconds[phase] == pytest.approx(sum(entry["seconds"][phase] for entry in result.history))


@pytest.mark.parametrize(("found", "taught"), [([], False), ([2, 5], True)])
def test_steady_images_stay_the_way_unless_it_is_one_label(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch, found: list[int], taught: bool
) -> None:
    def changed(distances: Tensor) -> Tensor:
        return torch.tensor([k in found for k in range(8)]) & (distances > 0)

    seen = _watch(monkeypatch, of_eight, attracting=[], changed=changed)
    run(of_eight.model, of_eight.train_data, initial="steady")
    assert seen.left_out[2:] == [found]
    assert seen.fragile == [True, True, True] and seen.steady == [True, True]
    assert seen.taught == [True, True, taught, False, False]


def test_labels_without_images_are_in_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = infect(classes=8, names="abcdefghij")
    seen = _watch(monkeypatch, wider, attracting=[])
    run(wider.model, wider.train_data, initial="steady")
    assert seen.left_out[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_of_few_labels_none_is_left_out(infected: InfectedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _watch(monkeypatch, infected, attracting=[])
    result = run(infected.model, infected.train_data, initial="steady")
    assert seen.left_out == [[]] and seen.fragile == [True] and seen.taught == [False] * 3
    assert not any(phase.startswith("labels left out") for phase in result.seconds)


def test_of_a_label_that_changed_an_image_has_to_rank_clean_after_every_round(
    of_eight: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_round: list[Tensor] = []
    asked: list[tuple[Tensor, Tensor]] = []
    told: list[Tensor] = []

    def ranked(*arguments: Any) -> Any:
        by_round.append(rank_images(*arguments).distance)
        return rank_images(*arguments)

    def chosen(ranking: Any, *arguments: Any, **keywords: Any) -> Tensor:
        asked.append((ranking.distance, keywords["agrees"]))
        assert keywords["changed"].tolist() == [k == 2 for k in range(8)]
        return next_extra_set(ranking, *arguments, **keywords)

    _watch(monkeypatch, of_eight, attracting=[], changed=lambda distances: torch.arange(8) == 2)
    rounds = sys.modules["pbe_fast.rounds"]
    monkeypatch.setattr(rounds, "rank_images", ranked)
    monkeypatch.setattr(rounds, "next_extra_set", chosen)
    config = dataclasses.replace(QUICK, initial="steady")
    common: dict[str, Any] = {"device": "cpu", "precision": "fp32", "progress": False}
    result = purify(
        of_eight.model,
        of_eight.train_data,
        config=config,
        on_round=lambda t, model, ranking: told.append(ranking.distance if ranking else torch.empty(0)),
        **common,
    )
    by_round = by_round[2:]  # after those without half of the labels
    target = of_eight.train_data.labels == 2
    expected = [torch.where(target, torch.stack(by_round[: t + 1]).amax(0), by_round[t]) for t in range(3)]
    assert any(not torch.equal(a, b) for a, b in zip(expected, by_round, strict=True)), "or this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(told, expected, strict=True))
    (first, agrees), (second, agrees_later) = asked
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert (agrees_later[target] <= agrees[target]).all()
    assert result.ranking is not None and torch.equal(result.ranking.distance, expected[2])
    assert torch.equal(result.ranking.order, expected[2].argsort(stable=True))
    mask = of_eight.train_data.poison_mask
    assert mask is not None and result.history[-1]["ap_of_poisoned"] == result.ranking.ap_of_poisoned(mask)


def test_where_a_label_attracts_every_round_goes_by_its_own_ranking(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def chosen(*arguments: Any, **keywords: Any) -> Tensor:
        asked.append(keywords["changed"])
        return next_extra_set(*arguments, **keywords)

    seen = _watch(monkeypatch, infected, attracting=[1, 3], changed=lambda distances: torch.arange(4) == 1)
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    result = run(infected.model, infected.train_data, initial="steady")
    assert seen.left_out == [[1, 3]] and seen.fragile == [False] and seen.taught == [True, False, False]
    assert all(entry["labels_apart"] == [1, 3] for entry in result.history)
    assert not any(changed.any() for changed in asked)
    expected = rank_images(*(predict_logits(m, infected.train_data.images) for m in (infected.model, result.model)))
    assert result.ranking is not None
    torch.testing.assert_close(result.ranking.distance, expected.distance, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("options", [{"leave_out": False}, {"initial": "hard"}, {"initial": "random"}])
def test_no_label_is_left_out_where_that_is_not_asked_for(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    result = run(infected.model, infected.train_data, **{"initial": "steady", **options})
    assert not any(phase.startswith("labels left out") for phase in result.seconds)


# With a clean set


def test_with_a_clean_set_there_may_be_one_round_and_a_ranking_for_the_record(infected: InfectedModel) -> None:
    result = run(infected.model, infected.train_data, quarters(40, seed=1), refining_fractions=())
    (entry,) = result.history
    assert entry["extra_set_size"] == 40
    assert entry["seconds"].keys() == {"adversarial", "clean", "ranking"}
    assert "extra_set_poison_rate" not in entry
    assert {"ap_of_poisoned", "ap_of_clean"} <= set(entry)
    assert result.ranking is not None
    assert len(result.ranking.order) == 160


def test_with_a_clean_set_further_rounds_are_on_what_ranks_clean_after_it(infected: InfectedModel) -> None:
    mask = infected.train_data.poison_mask
    assert mask is not None
    clean = quarters(40, seed=1)
    once = run(infected.model, infected.train_data, clean, refining_fractions=())
    assert once.ranking is not None and once.history[0]["labels_apart"] == []
    twice = run(infected.model, infected.train_data, clean, refining_fractions=(0.25, 0.5))
    assert [entry["round"] for entry in twice.history] == [0, 1, 2]
    assert [entry["extra_set_size"] for entry in twice.history] == [40, 40, 80]
    assert twice.history[1]["extra_set_poison_rate"] == poisoned_share(once.ranking.top(0.25), mask)
    assert not torch.equal(logits(once.model), logits(twice.model))
    assert twice.ranking is not None and not torch.equal(once.ranking.distance, twice.ranking.distance)


def test_with_a_clean_set_the_labels_that_changed_are_set_apart_and_the_first_round_is_taught(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[list[int]] = []

    def chosen(*arguments: Any, **keywords: Any) -> Tensor:
        apart.append(arguments[2].nonzero()[:, 0].tolist())
        return next_extra_set(*arguments, **keywords)

    seen = _watch(monkeypatch, infected, attracting=[], changed=lambda distances: torch.arange(4) == 3)
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    result = run(infected.model, infected.train_data, quarters(40, seed=1), refining_fractions=(0.3, 0.5))
    assert seen.left_out == [] and seen.taught == [True, False, False]
    assert apart == [[3], [3]]
    assert [entry["labels_apart"] for entry in result.history] == [[3]] * 3


def test_with_a_clean_set_the_training_set_may_be_missing_and_is_only_ranked_if_so_asked(
    infected: InfectedModel,
) -> None:
    clean = quarters(40, seed=1)
    alone = run(infected.model, None, clean)
    assert alone.ranking is None
    assert alone.train_data is None
    assert len(alone.history) == 1 and alone.history[0]["seconds"].keys() == {"adversarial", "clean"}
    with pytest.raises(ValueError, match="no ranking"):
        alone.suspected()
    ranked = run(infected.model, infected.train_data, clean, refining_fractions=())
    assert torch.equal(logits(alone.model), logits(ranked.model))


def test_a_pair_of_arrays_will_do_and_takes_the_classes_of_the_training_set(infected: InfectedModel) -> None:
    clean = quarters(40, seed=1)
    some = clean.labels < 2
    pair = (clean.images[some].numpy(), clean.labels[some].numpy())
    result = run(infected.model, infected.train_data, pair)
    assert result.history[0]["extra_set_size"] == 20
