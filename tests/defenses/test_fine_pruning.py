from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pbe_fast.baselines import BASELINES, FinePruningConfig
from pbe_fast.data import split
from pbe_fast.defenses import fine_prune
from pbe_fast.defenses.fine_pruning import features_of, pruned_accuracies, pruned_units
from pbe_fast.engine.forward import to_input
from pbe_fast.errors import InputError
from pbe_fast.export import export_onnx
from pbe_fast.models import features, last_linear
from pbe_fast.result import PurifyResult

CONFIG = FinePruningConfig(
    finetune=dataclasses.replace(BASELINES["fp"].finetune, batch_size=70), epochs=1, min_updates=6, max_drop=0.3
)


@pytest.fixture(scope="module")
def result(infected: Any) -> PurifyResult:
    return fine_prune(infected.model, infected.clean, config=CONFIG, device="cpu", precision="fp32", progress=False)


def dead(model: nn.Module) -> list[int]:
    return (last_linear(model).weight == 0).all(0).nonzero()[:, 0].tolist()


def test_pruned_are_the_units_that_sleep_on_the_other_part_of_the_clean_set(infected: Any, result: Any) -> None:
    held_out, rest = split(infected.clean, 0.2, seed=0)
    with torch.no_grad():
        activation = features(infected.model, to_input(rest.images)).abs().mean(0)
    pruned = dead(result.model)
    assert pruned and len(pruned) < 16
    assert sorted(activation.argsort()[: len(pruned)].tolist()) == pruned
    assert result.history[0]["finding"] == f"pruned {len(pruned)} of 16 units"
    assert result.history[0]["images"] == len(held_out) == 28

    # One unit more would break the limit, and by these figures the last one did not.
    def accuracy(units: int) -> float:
        with torch.no_grad():
            x = features(infected.model, to_input(held_out.images))
            x[:, activation.argsort()[:units]] = 0
            return float((last_linear(infected.model)(x).argmax(1) == held_out.labels).double().mean())

    limit = 0.7 * accuracy(0)
    assert [accuracy(n) >= limit for n in range(len(pruned) + 2)] == [True] * (len(pruned) + 1) + [False]
    assert result.history[0]["held_out_acc_before"] == accuracy(0)
    assert result.history[0]["held_out_acc"] == accuracy(len(pruned))


def test_fine_tuning_leaves_them_pruned_and_changes_the_rest(infected: Any, result: Any) -> None:
    before, after = last_linear(infected.model).weight, last_linear(result.model).weight
    assert torch.equal(after[:, dead(result.model)], torch.zeros(10, len(dead(result.model))))
    alive = [k for k in range(16) if k not in dead(result.model)]
    assert (after[:, alive] != before[:, alive]).all()


def test_they_are_zero_in_the_exported_file(result: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = export_onnx(result.model, tmp_path / "m.onnx", image_shape=(1, 16, 16))
    weights = [torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in onnx.load(path).graph.initializer]
    (head,) = [w if w.shape == (10, 16) else w.T for w in weights if sorted(w.shape) == [10, 16]]
    assert (head[:, dead(result.model)] == 0).all() and (head != 0).any()


def test_the_step_that_breaks_the_limit_is_not_kept() -> None:
    head = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
    # Every image of class 0 needs one unit more than the one before it.
    x = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]) - 0.1
    labels = torch.zeros(4, dtype=torch.long)
    order = torch.tensor([3, 2, 1, 0])
    accuracies = [1.0, 0.75, 0.5]
    for limit, kept in ((0.0, 1), (0.25, 2), (0.3, 2), (0.5, 3)):
        config = FinePruningConfig(max_drop=limit, prune_step=0.25)
        assert pruned_accuracies(head, x, labels, order, config) == accuracies[:kept]


def test_a_step_is_a_share_of_the_units_and_at_least_one() -> None:
    assert [pruned_units(512, n, 0.01) for n in (0, 1, 2, 103)] == [0, 5, 10, 512]
    assert [pruned_units(16, n, 0.01) for n in (0, 1, 2, 17)] == [0, 1, 2, 16]


def test_features_are_the_same_in_batches(infected: Any) -> None:
    data = infected.attack.train_data
    with torch.no_grad():
        whole = features(infected.model, to_input(data.images))
    torch.testing.assert_close(features_of(infected.model, data, torch.float32), whole)


def test_models_and_sets_that_cannot_be_pruned(infected: Any) -> None:
    headless = nn.Sequential(nn.Conv2d(1, 10, 16), nn.Flatten())
    with pytest.raises(InputError, match="without a linear layer"):
        fine_prune(headless, infected.clean, device="cpu", progress=False)
    with pytest.raises(InputError, match="amount to split off"):
        two = infected.clean.select([0, 1])
        fine_prune(infected.model, two, device="cpu", progress=False)
