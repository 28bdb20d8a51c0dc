"""Which rounds there are, what each learns from, and what is told of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from typing import Any

import pytest
import torch
from quarters import QUICK, infect, logits, quarters, run, watch
from torch import Tensor, nn

from pbe_fast.attack import InfectedModel
from pbe_fast.engine.forward import predict_logits
from pbe_fast.extra_set import initial_extra_set, next_extra_set
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
    first = run(infected.model, infected.train_data, fractions=(0.25,), label_floor=0.0)
    assert first.ranking is not None
    shares = []
    for fraction in (0.3, 0.6, 1.0):
        both = run(infected.model, infected.train_data, fractions=(0.25, fraction), label_floor=0.0)
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
    assert made == 3 * 9 + sum(per_round)


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

    monkeypatch.setattr(sys.modules["pbe_fast.steps"], "predict_logits", watched)
    run(infected.model, infected.train_data)
    # The infected model is the one that never trains.
    assert shown == [(False, 160), (True, 160), (True, 160), (True, 160)]


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


def test_with_a_clean_set_further_rounds_are_on_what_ranks_clean_after_it(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, infected, attracting=[], changed=lambda distances: torch.zeros(4, dtype=torch.bool))
    mask = infected.train_data.poison_mask
    assert mask is not None
    clean = quarters(40, seed=1)
    once = run(infected.model, infected.train_data, clean, refining_fractions=())
    assert once.ranking is not None and once.history[0]["labels_apart"] == []
    twice = run(infected.model, infected.train_data, clean, refining_fractions=(0.25, 0.5), fragile_share=0.0)
    assert [entry["round"] for entry in twice.history] == [0, 1, 2]
    assert [entry["extra_set_size"] for entry in twice.history] == [40, 40, 80]
    assert twice.history[1]["extra_set_poison_rate"] == poisoned_share(once.ranking.top(0.25), mask)
    assert not torch.equal(logits(once.model), logits(twice.model))
    assert twice.ranking is not None and not torch.equal(once.ranking.distance, twice.ranking.distance)


@pytest.mark.parametrize("attracting", [[], [1], [3]])
def test_with_a_clean_set_the_labels_that_changed_or_attract_are_set_apart_and_the_first_round_is_taught(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch, attracting: list[int]
) -> None:
    apart: list[tuple[list[int], list[int]]] = []

    def chosen(*arguments: Any, **keywords: Any) -> Tensor:
        apart.append((arguments[2].nonzero()[:, 0].tolist(), keywords["changed"].nonzero()[:, 0].tolist()))
        return next_extra_set(*arguments, **keywords)

    seen = watch(monkeypatch, infected, attracting=attracting, changed=lambda distances: torch.arange(4) == 3)
    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", chosen)
    result = run(infected.model, infected.train_data, quarters(40, seed=1), refining_fractions=(0.3, 0.5))
    assert seen.left_out == [] and seen.taught == ["all", None, None]
    either = sorted({3, *attracting})
    assert apart == [(either, [3])] * 2
    assert [entry["labels_apart"] for entry in result.history] == [either] * 3


@pytest.mark.parametrize(("attracting", "share", "kept_out"), [([], 0.3, True), ([], 0.0, False), ([1], 0.3, False)])
def test_with_a_clean_set_fragile_images_have_to_show_more_where_no_label_is_set_apart(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch, attracting: list[int], share: float, kept_out: bool
) -> None:
    # What is poisoned from label to label ranks clean as long as the trigger is there.
    seen = watch(
        monkeypatch, infected, attracting=attracting, changed=lambda distances: torch.zeros(4, dtype=torch.bool)
    )
    clean, options = quarters(40, seed=1), {"refining_fractions": (0.3, 0.5), "fragile_share": share}
    result = run(infected.model, infected.train_data, clean, **options)
    assert seen.steady == [kept_out] * 2
    assert ("steady images" in result.seconds) == kept_out
    # Nor does it go by what the first extra set of a run without a clean set is.
    assert run(infected.model, infected.train_data, clean, **options, initial="steady").seconds.keys() == (
        result.seconds.keys()
    )


def test_without_further_rounds_no_label_is_looked_for(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, infected, attracting=[1])
    once = run(infected.model, infected.train_data, quarters(40, seed=1), refining_fractions=())
    assert once.history[0]["labels_apart"] == [] and "attracting labels" not in once.seconds


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


def test_a_step_without_updates_has_no_loss(infected: InfectedModel) -> None:
    config = dataclasses.replace(QUICK, adversarial_steps=0)
    (entry, *_) = purify(infected.model, infected.train_data, config=config, device="cpu", progress=False).history
    assert entry["adversarial_loss"] is None and entry["clean_loss"] > 0


def test_images_that_nothing_tells_apart_are_not_taken_in_the_order_of_the_file(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def initial(*arguments: Any, fragility: Tensor) -> Tensor:
        seen.append(fragility)
        return initial_extra_set(*arguments, fragility=fragility)

    rounds = sys.modules["pbe_fast.rounds"]
    monkeypatch.setattr(rounds, "attracting_labels", lambda counts: torch.zeros(4, dtype=torch.bool))
    monkeypatch.setattr(rounds, "fragility", lambda model, data, *rest, **options: torch.zeros(len(data)))
    monkeypatch.setattr(rounds, "initial_extra_set", initial)
    config = dataclasses.replace(QUICK, initial="steady", fractions=(0.1,))
    for _ in range(2):
        purify(infected.model, infected.train_data, config=config, device="cpu", progress=False)
    first, second = seen
    assert len(first.unique()) > len(first) / 2
    assert first.equal(second)
