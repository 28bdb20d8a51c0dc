from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quarters import PLAIN, QUICK, infect, logits, quarters, run
from torch import Tensor, nn

import pbe_fast
from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import as_image_set, split
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.streaming import stream
from pbe_fast.metrics import evaluate
from pbe_fast.models import Normalized, SmallCNN
from pbe_fast.poison import triggered_test_set
from pbe_fast.purify import purify


@pytest.fixture(scope="module")
def infected() -> InfectedModel:
    return infect()


# The caller's model


def _frozen(model: nn.Module) -> nn.Module:
    model.get_submodule("0").requires_grad_(False)
    return model.eval()


def _partly_training(model: nn.Module) -> nn.Module:
    model.train()
    model.get_submodule("1").eval()
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eval": lambda m: m.eval(),
    "train": lambda m: m.train(),
    "partly training": _partly_training,
    "half": lambda m: m.half().eval(),
    "double": lambda m: m.double().eval(),
    "frozen": _frozen,
    "all frozen": lambda m: m.requires_grad_(False),
}


def _description(model: nn.Module) -> list[tuple[Any, ...]]:
    parameters = [(n, p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()]
    buffers = [(n, b.dtype, b.device, b.requires_grad) for n, b in model.named_buffers()]
    return parameters + buffers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_clean_set", [False, True])
def test_the_caller_s_model_is_not_changed_and_the_new_one_is_of_its_kind(
    infected: InfectedModel, variant: str, with_clean_set: bool
) -> None:
    model = VARIANTS[variant](copy.deepcopy(infected.model))
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    strides = [p.stride() for p in model.parameters()]
    sets: dict[str, Any] = {"clean": quarters(40, seed=1)} if with_clean_set else {"train": infected.train_data}
    result = run(model, **sets)

    assert [m.training for m in model.modules()] == modes
    assert _description(model) == _description(before)
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name

    assert result.model is not model
    assert _description(result.model) == _description(before)
    assert not any(m.training for m in result.model.modules())
    for name, value in result.model.state_dict().items():
        assert value.isfinite().all()
        # Before batch normalisation a bias does nothing, and hardly moves.
        assert name == "0.bias" or not torch.equal(value, before.state_dict()[name]), name
    predict_logits(result.model, infected.train_data.images)  # it works in its own dtype


def test_the_user_s_data_are_not_changed(infected: InfectedModel) -> None:
    before = infected.train_data.images.clone()
    run(infected.model, infected.train_data)
    assert torch.equal(infected.train_data.images, before)


# What decides


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("with_clean_set", [False, True])
def test_the_seed_fixes_everything(infected: InfectedModel, random_start: bool, with_clean_set: bool) -> None:
    pgd = PGDConfig(eps=0.05, steps=2, random_start=random_start)
    finetune = dataclasses.replace(PLAIN, augment="crop")
    sets: dict[str, Any] = {"clean": quarters(40, seed=1)} if with_clean_set else {"train": infected.train_data}
    results = []
    for outer, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(outer)
        results.append(logits(run(infected.model, **sets, seed=seed, pgd=pgd, finetune=finetune).model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_the_global_random_state_goes_on_as_before(infected: InfectedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(infected.model, infected.train_data)
    assert torch.equal(torch.rand(3), expected)


# Larger than the device


@pytest.mark.parametrize("with_clean_set", [False, True])
def test_data_larger_than_the_device_give_the_same_result(
    infected: InfectedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_clean_set: bool
) -> None:
    sent: list[int] = []

    def watched(images: Tensor, batches: Iterable[Tensor | slice], device: torch.device) -> Iterator[Tensor]:
        for batch in stream(images, batches, device):
            sent.append(len(batch))
            yield batch

    for module in ("pbe_fast.data.feeding", "pbe_fast.engine.forward"):
        monkeypatch.setattr(sys.modules[module], "stream", watched)
    np.save(tmp_path / "images.npy", infected.train_data.images.numpy())
    on_disk = (np.load(tmp_path / "images.npy", mmap_mode="r"), infected.train_data.labels.numpy())
    clean = quarters(40, seed=1) if with_clean_set else None
    finetune = dataclasses.replace(PLAIN, augment="crop+flip")
    config = dataclasses.replace(QUICK, finetune=finetune, initial="steady")
    results = []
    for data, limit in ((infected.train_data, None), (infected.train_data, 500), (on_disk, 500)):
        sent.clear()
        results.append(
            purify(
                infected.model,
                data,
                clean_data=clean,
                config=config,
                device_memory_limit=limit,
                device="cpu",
                precision="fp32",
                progress=False,
            )
        )
        # Batches of fine-tuning hold at most 32 images of 160.
        assert sum(sent) > 160 if limit else not sent
    resident, *others = results
    assert resident.ranking is not None
    for other in others:
        assert torch.equal(logits(other.model), logits(resident.model))
        assert other.ranking is not None
        assert torch.equal(other.ranking.distance, resident.ranking.distance)


# Where the time goes


def test_a_profile_tells_the_work_of_every_phase_and_lands_in_the_report(
    infected: InfectedModel, tmp_path: Path
) -> None:
    result = purify(
        infected.model,
        infected.train_data,
        config=QUICK,
        profile=True,
        device="cpu",
        precision="fp32",
        progress=False,
    )
    out = result.save(tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    rows = {row["phase"]: row for row in report["profile"]["phases"]}
    done = {name: round(row["images_per_second"] * row["seconds"]) for name, row in rows.items()}
    passes = {name: round(row["forwards_per_second"] * row["seconds"]) for name, row in rows.items()}
    # Extra sets of 16, 40 and 80 images in 1, 2 and 3 batches: nine adversarial updates a round, three clean ones.
    adversarial = 9 * 16 + 9 * 20 + 3 * 80
    waves = 2 * 16 + 2 * 20 + (26 + 27)
    assert done["infected logits"] == 160
    assert done["ranking"] == 3 * 160
    assert done["adversarial"] == pytest.approx(adversarial, abs=1)
    # Two steps of PGD at two passes, none for a wave, an update at three on each of two images.
    expected = 2 * 2 * (adversarial - waves) + 3 * 2 * adversarial
    assert passes["adversarial"] == pytest.approx(expected, abs=4)
    assert passes["clean"] == 3 * done["clean"]
    trace = json.loads((out / "trace.json").read_text())
    assert {e["name"] for e in trace["traceEvents"] if e.get("cat") == "phase"} == set(rows)
    assert "trace.json" in report["sha256"]["outputs"]
    assert run(infected.model, infected.train_data).profile is None


# Whether it works


def test_digits_are_purified_with_a_clean_set() -> None:
    train, test = (as_image_set(f"digits:{part}", progress=False) for part in ("train", "test"))
    clean, train = split(train, 140, seed=0)
    torch.manual_seed(0)
    model = Normalized(SmallCNN(10, width=12), [0.3], [0.35])
    training = FineTuneConfig(lr=0.05, batch_size=64, nesterov=True, warmup=0.1, mix_clean=False, distill_weight=0.0)
    attack = AttackConfig(attack="blend", epochs=10, training=training)
    infected = train_infected(model, train, config=attack, device="cpu", precision="fp32", progress=False)
    triggered = triggered_test_set(test, infected.trigger)
    before = evaluate(infected.model, test, triggered)
    assert before.acc > 0.9
    assert before.asr is not None and before.asr > 0.95

    config = PurifyConfig(
        pgd=PGDConfig(eps=0.1, steps=5),
        finetune=FineTuneConfig(lr=0.02, batch_size=70),
        adversarial_steps=40,
        clean_steps=50,
    )
    result = pbe_fast.purify(
        infected.model, clean_data=clean, config=config, device="cpu", precision="fp32", progress=False
    )
    after = evaluate(result.model, test, triggered)
    assert after.asr is not None and after.asr < 0.15
    assert after.acc > before.acc - 0.04
    assert after.recovered_acc is not None and after.recovered_acc > 0.7
