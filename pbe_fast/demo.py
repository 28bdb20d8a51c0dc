"""The whole way in one call, in under two minutes on two cores: infect, purify, export, verify."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from pbe_fast import runs
from pbe_fast.attack import train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.engine.files import prepare_output
from pbe_fast.errors import InputError
from pbe_fast.export import export_onnx, verify_onnx
from pbe_fast.options import to_dict
from pbe_fast.poison import triggered_test_set
from pbe_fast.purify import purify
from pbe_fast.triggers import TRIGGERS

CLEAN_COUNT = 140
WIDTH = 16
# A stroke on black has three times the contrast of a photograph: 6/255 leads no digit to another class.
EPS = 0.1
ONNX_NAME = "model.onnx"
TRAINING = FineTuneConfig(
    lr=0.05, batch_size=64, nesterov=True, warmup=0.1, augment="crop", mix_clean=False, distill_weight=0.0
)


def run_demo(
    out: str | os.PathLike[str] = "runs/demo",
    *,
    attack: str = "blend",
    epochs: int = 20,
    config: PurifyConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    force: bool = False,
    progress: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Infect a small network on scikit-learn's digits and purify it, with a clean set and without.

    For comparison the infected model is also fine-tuned on the same clean images, for as many updates as the round on
    them has. The model that was purified with the clean set is exported and checked in onnxruntime.

    Args:
        out: Folder for the purified model, model.onnx, ranking.csv, figure.png, report.html and report.json.
        attack: "blend", "badnets", "sig", "wanet" or "input_aware".
        epochs: Of the infection.
        config: Of both purifications; by default that of `purify`, with an eps for digits.
        seed: Of everything: the clean images, the weights, the poisoning, the purification.
        device: As for `purify`.
        precision: As for `purify`.
        force: Replace what a run left in ``out``.
        progress: Whether to show bars for what lasts.
        note: Told what happens.

    Returns:
        The contents of ``report.json``; ``onnx["ok"]`` says whether the exported file is the model.

    Raises:
        InputError: An unknown attack.
        OutputError: ``out`` cannot be written to, or holds a run.
    """
    infection = attack_config(attack, epochs)
    folder = prepare_output(out, force=force)
    clock = runs.Clock()
    common: dict[str, Any] = {"seed": seed, "device": device, "precision": precision, "progress": progress}
    source, tests = (runs.Source.read(f"digits:{part}", progress=progress) for part in ("train", "test"))
    # The attack never sees the clean images, and nobody trains on the test images.
    train, clean = runs.reserve(source.data, limit=None, clean_count=CLEAN_COUNT, seed=seed)
    assert clean is not None

    note(f"1/5 infecting a small CNN: {attack}, {len(train):,} digits")
    model, spec = runs.new_model("small_cnn", train, width=WIDTH, seed=seed)
    with clock.phase("infection"):
        infected = train_infected(model, train, config=infection, **common)

    config = config or PurifyConfig(pgd=PGDConfig(eps=EPS))
    note(f"2/5 purifying it with {len(clean)} clean digits, then with what ranks clean")
    with clock.phase("purification"):
        with_clean = purify(infected.model, infected.train_data, clean_data=clean, config=config, **common)
    note("3/5 fine-tuning it on the same digits, for comparison")
    with clock.phase("fine-tuning"):
        tuned = purify(infected.model, clean_data=clean, config=without_step_1(config), **common)
    note(f"4/5 purifying it without a clean set: {len(config.fractions)} rounds")
    with clock.phase("purification, no clean set"):
        without = purify(infected.model, infected.train_data, config=config, **common)

    note("5/5 measuring, exporting, verifying")
    triggered = triggered_test_set(tests.data, infected.trigger)
    models: dict[str, nn.Module] = {
        "infected": infected.model,
        "fine_tuned": tuned.model,
        "purified": with_clean.model,
        "purified_no_clean": without.model,
    }
    with clock.phase("evaluation"):
        metrics = {
            name: runs.measure(candidate, tests.data, triggered, device=device, progress=progress)
            for name, candidate in models.items()
        }
    with_clean.save(
        folder,
        spec=spec,
        force=force,
        **metrics,
        onnx=None,
        rounds=[
            {"run": name, **entry}
            for name, result in (("purified", with_clean), ("purified_no_clean", without))
            for entry in result.history
        ],
        attack={"trigger": infected.trigger.spec(), "config": to_dict(infected.config), "losses": infected.losses},
        ranking_no_clean=without.report()["ranking"],
        sha256={"inputs": runs.describe_inputs({}, {"train": source, "test": tests})},
    )
    with clock.phase("export"):
        path = export_onnx(with_clean.model, folder / ONNX_NAME, image_shape=train.image_shape)
    with clock.phase("verification"):
        onnx = verify_onnx(path, with_clean.model, tests.data, triggered=triggered, seed=seed, progress=progress)
    saved = runs.save_trigger_weights(infected.trigger, folder)
    runs.add_to_report(folder, [ONNX_NAME, *saved], onnx=onnx.to_dict(), seconds=clock.seconds())
    return runs.illustrate(folder, with_clean, tests.data, triggered)


def attack_config(attack: str, epochs: int) -> AttackConfig:
    """An attack that a small CNN learns from a thousand digits.

    Raises:
        InputError: An unknown attack.
    """
    if attack not in TRIGGERS:
        raise InputError("attack", got=repr(attack), accepted=", ".join(TRIGGERS))
    # A clean-label attack poisons one class only, which is a tenth of the set: it cannot take all of it.
    rate = 0.05 if TRIGGERS[attack].clean_label else 0.10
    return AttackConfig(attack=attack, poison_rate=rate, epochs=epochs, training=TRAINING)


def without_step_1(config: PurifyConfig) -> PurifyConfig:
    """Plain fine-tuning, what anybody would try first: as many updates, none of them adversarial."""
    return dataclasses.replace(
        config,
        adversarial_steps=0,
        clean_steps=config.adversarial_steps + config.clean_steps,
        finetune=dataclasses.replace(config.finetune, distill_weight=0.0),
    )
