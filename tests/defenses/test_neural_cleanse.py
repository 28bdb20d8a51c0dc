from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pbe_fast.baselines import BASELINES, NeuralCleanseConfig
from pbe_fast.data import ImageSet
from pbe_fast.defenses import neural_cleanse, trigger_search
from pbe_fast.defenses.neural_cleanse import anomaly_indices, small_outliers, stamp_some
from pbe_fast.defenses.trigger_search import CostSchedule, Triggers, search_triggers
from pbe_fast.engine.copies import frozen_copy
from pbe_fast.result import PurifyResult

CONFIG = NeuralCleanseConfig(
    finetune=dataclasses.replace(BASELINES["nc"].finetune, batch_size=70), epochs=1, min_updates=4,
    trigger_rounds=12, updates_per_round=2, trigger_batch=20, trigger_success=0.5, patience=1,
)  # fmt: skip


def run(infected: Any, **options: Any) -> PurifyResult:
    config = dataclasses.replace(CONFIG, **options)
    return neural_cleanse(infected.model, infected.clean, config=config, device="cpu", precision="fp32", progress=False)


def triggers(count: int = 3) -> Triggers:
    generator = torch.Generator().manual_seed(0)
    masks, patterns = torch.rand(count, 1, 4, 4, generator=generator), torch.rand(count, 3, 4, 4, generator=generator)
    return Triggers(masks, patterns, torch.arange(count) != 1, [5] * count)


# The anomaly index


def test_the_anomaly_index_by_hand() -> None:
    # Median 10, absolute deviations 8 1 0 1 3, their median 1.
    norms = torch.tensor([2.0, 9.0, 10.0, 11.0, 13.0])
    expected = torch.tensor([8.0, 1.0, 0.0, 1.0, 3.0], dtype=torch.float64) / 1.4826
    torch.testing.assert_close(anomaly_indices(norms), expected)
    assert small_outliers(norms, 2.0) == [0], "13 is an outlier too, but a large mask is no backdoor's"
    assert small_outliers(norms, 6.0) == []


def test_an_even_number_of_labels_and_equal_norms() -> None:
    # Median 2.5, absolute deviations 1.5 0.5 0.5 1.5, their median 1.
    torch.testing.assert_close(
        anomaly_indices(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([1.5, 0.5, 0.5, 1.5]).double() / 1.4826
    )
    assert small_outliers(torch.full((5,), 3.0), 2.0) == []
    assert anomaly_indices(torch.tensor([1.0, 3, 3, 3])).tolist() == [math.inf, 0, 0, 0]


def test_a_label_that_no_trigger_reaches_counts_as_the_whole_picture() -> None:
    found = triggers()
    norms = found.norms()
    assert norms[1] == 16 and float(norms[0]) == pytest.approx(float(found.masks[0].sum()))


# The cost


def literal_schedule(successes: list[bool], patience: int) -> list[float]:
    """The rule in other words: every run of `patience` equal outcomes moves the cost, failures only once it is set."""
    cost, costs, run = 0.0, [], 0
    for i, success in enumerate(successes):
        run = run + 1 if i and successes[i - 1] == success else 1
        if run % patience == 0:
            factor = 2 if success else 1 / 3
            cost = cost * factor if cost else 0.001 * success
        costs.append(cost)
    return costs


def test_the_cost_follows_its_schedule() -> None:
    generator = torch.Generator().manual_seed(1)
    for patience in (1, 2, 3):
        rates = torch.rand(200, generator=generator).lt(0.7)
        # No failure before the cost is set: the counter of failures would go on from there.
        rates[:patience] = True
        config = NeuralCleanseConfig(patience=patience, cost=1e-3, cost_up=2.0, cost_down=3.0, trigger_success=0.9)
        schedule, costs = CostSchedule(config), []
        for success in rates.tolist():
            schedule.update(0.9 if success else 0.89, 5.0)
            costs.append(schedule.cost)
        expected = literal_schedule(rates.tolist(), patience)
        assert costs == pytest.approx(expected, rel=1e-9)
        assert len(set(costs)) > 4


def test_the_smallest_mask_that_succeeds_is_the_best() -> None:
    schedule = CostSchedule(NeuralCleanseConfig())
    seen = [(0.5, 1.0), (0.99, 9.0), (0.98, 8.0), (0.97, 2.0), (1.0, 8.5)]
    assert [schedule.update(success, norm) for success, norm in seen] == [False, True, True, False, False]
    assert schedule.best == 8.0


def test_a_search_ends_without_progress_but_not_before_the_cost_rose_and_fell() -> None:
    config = NeuralCleanseConfig(patience=1)
    schedule = CostSchedule(config)
    for _ in range(30):
        schedule.update(1.0, 5.0)
    assert not schedule.done
    schedule.update(0.0, 5.0)
    assert schedule.done
    early = CostSchedule(config)
    outcomes = [early.update(success, 5.0) or early.done for success in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0)]
    assert outcomes == [True, False, False, False, False, True]


# The search


def test_labels_side_by_side_are_as_labels_one_by_one(infected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen_copy(infected.model, torch.device("cpu"))
    few = infected.clean.select(range(16))
    config = dataclasses.replace(CONFIG, trigger_rounds=3, trigger_batch=16)

    def search() -> Triggers:
        return search_triggers(model, few, config, generator=torch.Generator().manual_seed(0))

    together = search()
    monkeypatch.setattr(trigger_search, "_MAX_PIXELS", 3 * 16 * 256)
    in_threes = search()
    assert together.masks.shape == (10, 1, 16, 16) and together.patterns.shape == (10, 1, 16, 16)
    torch.testing.assert_close(in_threes.masks, together.masks, atol=2e-3, rtol=0)
    torch.testing.assert_close(in_threes.patterns, together.patterns, atol=2e-3, rtol=0)
    for t in (together.masks, together.patterns):
        assert t.min() >= 0 and t.max() <= 1
    assert all(p.grad is None for p in model.parameters())


class Corner(nn.Module):
    """Answers by the pixel in the corner: bright is label 2; otherwise 0 or 1 by the brightness of the rest."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        corner, rest = images[:, 0, 0, 0], images[:, 0, 1:].mean((1, 2))
        return torch.stack([10 * (0.5 - rest), 10 * (rest - 0.5), 20 * (corner - 0.7)], 1)


def test_the_search_finds_the_one_pixel_that_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 6, 6), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(30) % 2, ("dark", "bright", "corner"))
    config = NeuralCleanseConfig(trigger_rounds=60, updates_per_round=4, trigger_batch=30, patience=2)
    found = search_triggers(Corner(), data, config, generator=generator)
    mask = found.masks[2, 0]
    assert found.reached.all() and mask.argmax() == 0
    assert mask[0, 0] * found.patterns[2, 0, 0, 0] > 0.6
    assert found.norms()[2] < 0.5 * found.norms()[:2].min()


def test_stamping_and_the_picture_by_their_formula() -> None:
    found = triggers()
    images = torch.rand(2, 3, 4, 4)
    expected = images.clone()
    for c in range(3):
        m = found.masks[2, 0]
        expected[:, c] = images[:, c] * (1 - m) + found.patterns[2, c] * m
    torch.testing.assert_close(found.stamp(images, 2), expected)
    assert torch.equal(found.picture(0), (found.masks[0] * found.patterns[0] * 255).round().to(torch.uint8))


def test_a_fifth_is_stamped_and_keeps_its_labels() -> None:
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(50) % 3)
    stamped = stamp_some(data, triggers(), [0, 2], 0.2, torch.Generator().manual_seed(0))
    changed = (stamped.images != images).flatten(1).any(1)
    assert changed.sum() == 10 and torch.equal(stamped.labels, data.labels)
    options = [(triggers().stamp(data.floats(changed), k) * 255).round().to(torch.uint8) for k in (0, 2)]
    matches = torch.stack([(stamped.images[changed] == o).flatten(1).all(1) for o in options])
    assert matches.any(0).all() and matches.any(1).all(), "each with one of the two triggers, and both occur"


# The whole


def test_without_an_outlier_nothing_is_done(infected: Any) -> None:
    result = run(infected, outlier_index=1e9)
    assert result.history[-1] == {"step": "unlearning", "finding": "no outlier: nothing done"}
    before = infected.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in result.model.state_dict().items())
    assert len(result.pictures) == 10


def test_outliers_are_named_unlearned_and_saved_as_pictures(infected: Any, tmp_path: Path) -> None:
    result = run(infected, outlier_index=0.5)
    entries = [e for e in result.history if "mask_norm" in e]
    assert [e["step"] for e in entries] == [f"trigger of {k}" for k in range(10)]
    norms = torch.tensor([e["mask_norm"] for e in entries], dtype=torch.float64)
    assert [e["anomaly_index"] for e in entries] == anomaly_indices(norms).tolist()
    outliers = [k for k, e in enumerate(entries) if e["outlier"]]
    assert outliers == small_outliers(norms, 0.5) != []
    finding = result.history[-1]["finding"]
    assert all(f"{k} (anomaly index {entries[k]['anomaly_index']:.1f})" in finding for k in outliers)
    out = result.save(tmp_path / "out")
    for name, picture in result.pictures.items():
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), picture[0].numpy())
    result.save(out, force=True)
    (out / "trigger_77.png").write_bytes(b"of an earlier run")
    quiet = dataclasses.replace(result, pictures={})
    quiet.save(out, force=True)
    assert list(out.glob("trigger_*.png")) == []


def test_the_model_searched_is_the_infected_one_and_it_stays_frozen(infected: Any) -> None:
    model = copy.deepcopy(infected.model)
    run(infected, outlier_index=1e9)
    assert all(p.grad is None for p in infected.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), infected.model.buffers(), strict=True))
