"""What holds for every baseline."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

import pbe_fast.defenses
from pbe_fast.baselines import BASELINES, METHOD_NAMES
from pbe_fast.defenses import DEFENSES
from pbe_fast.engine.forward import predict_logits
from pbe_fast.errors import InputError
from pbe_fast.models import load_model
from pbe_fast.ranking import rank_images
from pbe_fast.result import PurifyResult

TUNING = dataclasses.replace(BASELINES["ft"].finetune, batch_size=70)
SHORT = {"finetune": TUNING, "epochs": 1, "min_updates": 3}
QUICK = {
    "ft": dataclasses.replace(BASELINES["ft"], **SHORT),
    "fp": dataclasses.replace(BASELINES["fp"], **SHORT),
    "nad": dataclasses.replace(BASELINES["nad"], **SHORT, teacher_epochs=1),
    # Nearly every mask smaller than the median is an outlier, so that there is something to unlearn.
    "nc": dataclasses.replace(
        BASELINES["nc"],
        **SHORT,
        trigger_rounds=8,
        updates_per_round=2,
        trigger_batch=16,
        patience=1,
        outlier_index=0.01,
    ),
    "anp": dataclasses.replace(BASELINES["anp"], iterations=4, batch_size=32, max_drop=0.9),
}


def run(method: str, model: nn.Module, clean: Any, **options: Any) -> PurifyResult:
    options = {"config": QUICK[method], "device": "cpu", "precision": "fp32", "progress": False, **options}
    return DEFENSES[method](model, clean, **options)


def test_the_registry_holds_every_method_with_options_of_its_own() -> None:
    assert list(DEFENSES) == list(BASELINES) == [m for m in METHOD_NAMES if m != "pbe"]
    assert pbe_fast.defenses.nad is DEFENSES["nad"]
    assert pbe_fast.defenses.fine_tune is DEFENSES["ft"]


@pytest.mark.parametrize("method", DEFENSES)
def test_the_caller_s_model_stays_and_the_new_one_is_of_its_kind(infected: Any, method: str) -> None:
    model = copy.deepcopy(infected.model).double().train()
    model.net.bn1.eval().requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = run(method, model, infected.clean)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *result.model.modules()))
    assert not any(m.training for m in result.model.modules())
    for (name, old), new in zip(model.named_parameters(), result.model.parameters(), strict=True):
        assert (new.dtype, new.requires_grad) == (old.dtype, old.requires_grad), name
        assert not new._backward_hooks
    changed = [name for name, value in result.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and not torch.equal(
        predict_logits(model, infected.test.images), predict_logits(result.model, infected.test.images)
    )


@pytest.mark.parametrize("method", DEFENSES)
def test_the_seed_fixes_everything_and_the_training_set_changes_nothing(infected: Any, method: str) -> None:
    train = infected.attack.train_data
    first = run(method, infected.model, infected.clean)
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    second = run(method, infected.model, infected.clean, train_data=train)
    assert torch.equal(torch.rand(2), expected)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert first.ranking is None and first.train_data is None
    wanted = rank_images(predict_logits(infected.model, train.images), predict_logits(second.model, train.images))
    assert second.ranking is not None and torch.equal(second.ranking.order, wanted.order)
    # ANP may well prune the same few channels with another seed, but not with every other one.
    others = (run(method, infected.model, infected.clean, seed=seed).model.state_dict() for seed in (1, 2, 3, 4))
    assert any(
        not torch.equal(value, other[name]) for other in others for name, value in first.model.state_dict().items()
    )


@pytest.mark.parametrize("method", DEFENSES)
def test_gradients_are_on_inside_wherever_it_is_called(infected: Any, method: str) -> None:
    with torch.inference_mode():
        result = run(method, infected.model, infected.clean)
    before = infected.model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in result.model.state_dict().items())


@pytest.mark.parametrize("method", DEFENSES)
def test_what_is_saved_is_the_model_that_was_purified(infected: Any, method: str, tmp_path: Any) -> None:
    result = run(method, infected.model, infected.clean)
    assert result.method == method and result.config == QUICK[method]
    out = result.save(tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == method and "ranking" not in report
    assert all(entry["step"] for entry in report["rounds"]) and report["config"].keys() == vars(QUICK[method]).keys()
    pictures = {f"{name}.png" for name in result.pictures}
    assert {p.name for p in out.glob("*.png")} == pictures <= report["sha256"]["outputs"].keys()
    loaded, _ = load_model(out)
    images = infected.test.images
    assert torch.equal(predict_logits(loaded, images), predict_logits(result.model, images))


@pytest.mark.parametrize("method", DEFENSES)
def test_refusals_come_before_any_work(infected: Any, method: str) -> None:
    with pytest.raises(InputError, match=f"clean_data of {method}; got none"):
        run(method, infected.model, None)
    with pytest.raises(InputError, match=f"config; got dict; accepted: a {type(QUICK[method]).__name__}"):
        run(method, infected.model, infected.clean, config={"epochs": 1})
    with pytest.raises(InputError, match=r"seed; got 1\.5"):
        run(method, infected.model, infected.clean, seed=1.5)
    with pytest.raises(InputError, match="number of clean images; got 1"):
        run(method, infected.model, infected.clean.select([0]))
    with pytest.raises(InputError, match="fewer logits than the data has classes"):
        run(method, nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), infected.clean)
    with pytest.raises(InputError, match="clean images of another shape"):
        small = (torch.zeros(10, 1, 9, 9, dtype=torch.uint8), torch.arange(10))
        run(method, infected.model, small, train_data=infected.attack.train_data)
