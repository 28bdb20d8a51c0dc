from __future__ import annotations

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pbe_fast
from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet, as_image_set, split
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.streaming import stream
from pbe_fast.extra_set import initial_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner
from pbe_fast.metrics import evaluate
from pbe_fast.models import Normalized, SmallCNN
from pbe_fast.poison import triggered_test_set
from pbe_fast.purify import purify
from pbe_fast.ranking import poisoned_share, rank_images
from pbe_fast.result import PurifyResult

SHAPE = (1, 8, 8)
PLAIN = FineTuneConfig(lr=0.02, batch_size=32, augment="none")
QUICK = PurifyConfig(
    pgd=PGDConfig(eps=0.05, steps=2),
    finetune=PLAIN,
    adversarial_steps=7,
    clean_steps=3,
    clean_epochs=1,
    fractions=(0.1, 0.25, 0.5),
    initial="random",
)


def quarters(n: int = 160, seed: int = 0) -> ImageSet:
    """Four classes: which quarter of a noisy image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 60, (n, *SHAPE), dtype=torch.uint8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[i, 0, row : row + 3, column : column + 3] += 120
    return ImageSet(images, labels, tuple("abcd"), name="quarters")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 4)
    )


@pytest.fixture(scope="module")
def infected() -> InfectedModel:
    training = FineTuneConfig(lr=0.05, batch_size=32, augment="none", mix_clean=False, distill_weight=0.0)
    config = AttackConfig(attack="badnets", epochs=8, training=training)
    return train_infected(network(), quarters(), config=config, device="cpu", precision="fp32", progress=False)


def run(model: nn.Module, train: Any = None, clean: Any = None, *, seed: int = 0, **options: Any) -> PurifyResult:
    config = dataclasses.replace(QUICK, **options)
    return purify(
        model, train, clean_data=clean, config=config, seed=seed, device="cpu", precision="fp32", progress=False
    )


def logits(model: nn.Module) -> Tensor:
    return predict_logits(model, quarters(seed=9).images)


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


def _leaving_out(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[PurifyResult, list[list[int]]]:
    """A run in which the attack leads to no label, and the labels left out of each first extra set that was made."""
    left_out: list[list[int]] = []

    def watched(*arguments: Any, **keywords: Any) -> Tensor:
        left_out.append(arguments[2].nonzero()[:, 0].tolist())
        return initial_extra_set(*arguments, **keywords)

    rounds = sys.modules["pbe_fast.rounds"]
    monkeypatch.setattr(rounds, "attracting_labels", lambda counts: torch.zeros(4, dtype=torch.bool))
    monkeypatch.setattr(rounds, "initial_extra_set", watched)
    return run(infected.model, infected.train_data, initial="steady", **options), left_out


def test_half_of_the_labels_is_left_out_in_turn_and_then_those_that_changed(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []

    def third(distances: Tensor) -> Tensor:
        asked.append(distances)
        return torch.arange(4) == 2

    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "changed_labels", third)
    result, left_out = _leaving_out(infected, monkeypatch)
    assert left_out == [[0, 2], [1, 3], [2]]
    (distances,) = asked
    assert (distances > 0).all()
    assert all(entry["suspected_labels"] == [2] for entry in result.history)
    assert [entry["round"] for entry in result.history] == [0, 1, 2]
    # What it takes is told apart from the rounds.
    for phase in ("adversarial", "clean", "ranking"):
        assert result.seconds[f"labels left out: {phase}"] > 0
        assert result.seconds[phase] == pytest.approx(sum(entry["seconds"][phase] for entry in result.history))


def test_the_first_round_starts_from_the_infected_model_all_the_same(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[bool] = []

    def watched(self: FineTuner, *arguments: Any, **keywords: Any) -> float:
        if keywords["desc"].endswith("adversarial"):
            state = infected.model.state_dict()
            starts.append(all(torch.equal(value, state[name]) for name, value in self._model.state_dict().items()))
        return float(tune(self, *arguments, **keywords))

    tune = FineTuner.run
    monkeypatch.setattr(FineTuner, "run", watched)
    _leaving_out(infected, monkeypatch)
    assert starts == [True, True, True, False, False]


def test_of_suspected_labels_an_image_has_to_rank_clean_after_every_round(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(ranking: Any, *arguments: Any, **keywords: Any) -> Tensor:
        asked.append((ranking.distance, keywords["farthest"], keywords["agrees"]))
        return next_extra_set(ranking, *arguments, **keywords)

    monkeypatch.setattr(sys.modules["pbe_fast.rounds"], "next_extra_set", watched)
    run(infected.model, infected.train_data)
    (first, farthest, agrees), (second, farthest_of_both, agrees_twice) = asked
    assert torch.equal(farthest, first) and not torch.equal(first, second)
    assert torch.equal(farthest_of_both, first.maximum(second))
    assert (agrees_twice <= agrees).all()


@pytest.mark.parametrize("options", [{"leave_out": False}, {"initial": "hard"}, {"initial": "random"}])
def test_no_label_is_left_out_where_that_is_not_asked_for(
    infected: InfectedModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    result = run(infected.model, infected.train_data, **{"initial": "steady", **options})
    assert not any(phase.startswith("labels left out") for phase in result.seconds)


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
    # Extra sets of 16, 40 and 80 images in 1, 2 and 3 batches: seven adversarial updates a round, three clean ones.
    adversarial = 7 * 16 + 7 * 20 + (2 * 80 + 27)
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
    assert once.ranking is not None and once.history[0]["suspected_labels"] == []
    twice = run(infected.model, infected.train_data, clean, refining_fractions=(0.25, 0.5))
    assert [entry["round"] for entry in twice.history] == [0, 1, 2]
    assert [entry["extra_set_size"] for entry in twice.history] == [40, 40, 80]
    assert twice.history[1]["extra_set_poison_rate"] == poisoned_share(once.ranking.top(0.25), mask)
    assert not torch.equal(logits(once.model), logits(twice.model))
    assert twice.ranking is not None and not torch.equal(once.ranking.distance, twice.ranking.distance)


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
