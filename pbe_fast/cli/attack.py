from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    MODEL,
    OUTPUT,
    config_options,
    console_options,
    device_options,
    force_option,
    image_size_option,
    option,
    path_option,
    seed_option,
    with_values,
)
from pbe_fast.cli.shell import Command, Console, open_output
from pbe_fast.config import AttackConfig
from pbe_fast.engine import interrupts

_EXAMPLE = """
pbe-fast attack --data digits:train --test digits:test --arch small_cnn \\
    --attack blend --epochs 20 --clean-count 140 --out infected/
"""


@click.command(cls=Command, short_help="train an infected model, to have something to purify", example=_EXAMPLE)
@option("--data", section=INPUT, required=True, help=f"training images: {DATA_HELP}")
@option("--test", section=INPUT, help="test images, likewise; they are written with and without the trigger")
@option(
    "--limit",
    section=INPUT,
    type=click.IntRange(1),
    metavar="N",
    help="train on this many images, drawn class by class",
)
@option(
    "--clean-count",
    section=INPUT,
    type=click.IntRange(0),
    metavar="N",
    default=0,
    help="keep this many images from the attack and write them to clean.npz, for purify --clean",
)
@image_size_option
@option(
    "--arch",
    section=MODEL,
    default="preact_resnet18",
    show_default=True,
    help="preact_resnet18, resnet18, small_cnn, torchvision:NAME, or module:function of your own",
)
@option("--width", section=MODEL, type=click.IntRange(1), metavar="N", help="channels of the network's first stage")
@option(
    "--normalize/--no-normalize",
    section=MODEL,
    default=True,
    help="normalise the pixels by the training images' mean and deviation, inside the model  [default: on]",
)
@config_options(
    AttackConfig(),
    "Attack",
    skip=("mix_clean", "distill_weight", "distill_temperature"),
    aliases={"target_label": "--target"},
)
@option(
    "--trigger-option",
    section="Attack",
    multiple=True,
    metavar="NAME=VALUE",
    help="hyperparameter of the trigger, such as alpha=0.1 for blend; repeatable",
)
@path_option("--out", section=OUTPUT, required=True, help="folder for the infected model, the sets and report.json")
@force_option
@seed_option
@device_options("auto")
@console_options
def attack(
    *,
    console: Console,
    data: str,
    test: str | None,
    limit: int | None,
    clean_count: int,
    image_size: int | None,
    arch: str,
    width: int | None,
    normalize: bool,
    trigger_option: tuple[str, ...],
    out: Path,
    force: bool,
    seed: int,
    device: str,
    precision: str,
    **flags: Any,
) -> None:
    """Train an infected model, to have something to purify.

    Writes model.safetensors, config.json, train.npz (the poisoned training set with its poison_mask),
    poison_indices.json and report.json; with --test also test.npz and triggered.npz; with --clean-count also
    clean.npz; of a trigger that is trained along with the model (input_aware) also trigger.safetensors.
    """
    config = with_values(AttackConfig(), flags)
    hyperparameters = dict(_name_and_value(text) for text in trigger_option)
    if taken := [name for name in ("name", "image_shape") if name in hyperparameters]:
        raise click.BadParameter(
            f"{taken[0]!r} is settled by --attack and the images; accepted: a hyperparameter of the trigger",
            param_hint="--trigger-option",
        )
    open_output(out, force=force)

    from pbe_fast import runs
    from pbe_fast.attack import train_infected
    from pbe_fast.engine.precision import resolve_device
    from pbe_fast.poison import triggered_test_set
    from pbe_fast.report.tables import metrics_table
    from pbe_fast.triggers import make_trigger

    interrupts.check()
    clock = runs.Clock()
    resolve_device(device)
    with clock.phase("reading"):
        source = runs.Source.read(data, image_size=image_size, progress=console.progress)
        tests = None
        if test is not None:
            names = source.data.class_names
            tests = runs.Source.read(test, image_size=image_size, class_names=names, progress=console.progress)
        runs.require_same_kind(source, tests)
        train, clean = runs.reserve(source.data, limit=limit, clean_count=clean_count, seed=seed)
    trigger = make_trigger(config.attack, train.image_shape, **{"seed": seed, **hyperparameters})
    model, spec = runs.new_model(arch, train, width=width, normalize=normalize, seed=seed)
    console.note(
        f"training {arch} on {len(train):,} images of {source.data.name} with {config.attack}, "
        f"{config.epochs} epochs, seed {seed}"
    )
    with clock.phase("training"):
        infected = train_infected(
            model,
            train,
            config=config,
            trigger=trigger,
            seed=seed,
            device=device,
            precision=precision,
            progress=console.progress,
        )
    triggered = cover = None
    with clock.phase("evaluation"):
        if tests is not None:
            triggered = triggered_test_set(
                tests.data, infected.trigger, setting=config.setting, target_label=config.target_label
            )
            cover = runs.measure_cover(infected, tests.data, device=device, progress=console.progress)
        metrics = runs.measure(
            infected.model, tests.data if tests else None, triggered, device=device, progress=console.progress
        )
    report = runs.save_infected(
        out,
        infected,
        spec,
        test=tests.data if tests else None,
        clean=clean,
        report={
            "infected": metrics,
            **({} if cover is None else {"cover": cover}),
            "seconds": clock.seconds(),
            "sha256": {"inputs": runs.describe_inputs({}, {"data": source, "test": tests})},
        },
    )
    poisoned = report["train"]["poisoned"]
    console.note(f"poisoned {poisoned:,} of {len(train):,} images")
    if cover is not None:
        console.note(f"cover images, which should not trigger: ACC {cover['acc']:.2%}, ASR {cover['asr']:.2%}")
    console.note(f"wrote {out}: {', '.join([*report['sha256']['outputs'], 'report.json'])}")
    text = metrics_table({"infected": metrics}) if tests else f"infected model in {out}; --test would measure it"
    console.result(text, report)


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r}; accepted: NAME=VALUE, such as alpha=0.1", param_hint="--trigger-option")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value
