from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pbe_fast.baselines import METHOD_NAMES
from pbe_fast.cli.methods import method_config, method_options
from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    OUTPUT,
    RUN,
    console_options,
    device_options,
    force_option,
    image_size_option,
    model_options,
    option,
    path_option,
    seed_option,
    size_given,
)
from pbe_fast.cli.shell import Command, Console, open_output
from pbe_fast.cli.texts import findings_text, ranking_text
from pbe_fast.config import PurifyConfig
from pbe_fast.engine import interrupts
from pbe_fast.errors import InputError

if TYPE_CHECKING:
    from pbe_fast.data import ImageSet

# How Algorithm 1 chooses its extra sets.
_WITHOUT_CLEAN = ("fractions", "initial", "hard_quantile", "steady_share", "leave_out")
_EXAMPLE = """
pbe-fast purify --model infected/ --out purified/
pbe-fast purify --model infected/ --clean infected/clean.npz --out purified/
pbe-fast purify --model infected/ --clean infected/clean.npz --method nad --out nad/
pbe-fast purify --model net.pt --arch mymodels:make_net --train images/ --out purified/
"""


@click.command(cls=Command, short_help="erase the backdoor, rank the training images", example=_EXAMPLE)
@path_option(
    "--model", section=INPUT, required=True, help="folder that attack wrote, or weights: .safetensors, .pt, .pth, .ckpt"
)
@option("--train", section=INPUT, help=f"what it was trained on: {DATA_HELP}  [default: train.npz in MODEL, if there]")
@option("--clean", section=INPUT, help="trusted images, likewise: the first round is on them")
@option(
    "--clean-count",
    section=INPUT,
    type=click.IntRange(1),
    metavar="N",
    help="use only this many of --clean, drawn by class",
)
@option("--test", section=INPUT, help="test images, for the report  [default: test.npz in MODEL, if there]")
@option(
    "--triggered",
    section=INPUT,
    help="test images with the trigger, as attack writes them  [default: triggered.npz in MODEL, if there]",
)
@image_size_option
@model_options
@method_options
@path_option("--out", section=OUTPUT, required=True, help="folder for the purified model, ranking.csv and report.json")
@force_option
@seed_option
@device_options("auto")
@option(
    "--device-memory-limit",
    section=RUN,
    type=click.IntRange(0),
    metavar="MIB",
    help="send images batch by batch where a set takes more than this on the device  [default: half of a GPU's free "
    "memory]",
)
@option(
    "--profile",
    section=RUN,
    is_flag=True,
    help="say where the time goes, also in report.json, and write trace.json for chrome://tracing",
)
@console_options
def purify(
    *,
    console: Console,
    model: Path,
    train: str | None,
    clean: str | None,
    clean_count: int | None,
    test: str | None,
    triggered: str | None,
    image_size: int | None,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    method: str,
    recipe: str,
    out: Path,
    force: bool,
    seed: int,
    device: str,
    precision: str,
    device_memory_limit: int | None,
    profile: bool,
    **flags: Any,
) -> None:
    """Erase the backdoor that a model may carry, and rank its training images.

    Without --clean, all rounds of Algorithm 1 on the training images. Writes model.safetensors, config.json,
    ranking.csv (index, label, score, suspected), report.json and report.html; Neural Cleanse also the triggers that it
    recovers, as trigger_LABEL.png.
    """
    config = method_config(method, recipe, flags)
    if method != "pbe" and clean is None:
        raise click.UsageError(f"--method {method} needs --clean: trusted images")
    if method != "pbe" and (profile or device_memory_limit is not None):
        raise click.UsageError(f"--profile and --device-memory-limit are for --method pbe, not for {method}")
    if clean_count is not None and clean is None:
        raise click.UsageError("--clean-count needs --clean, to draw from")
    if model.resolve() in (out.resolve(), (out / "model.safetensors").resolve()):
        raise InputError("--out", got=f"{out}, where --model is", accepted="another folder")
    if method == "pbe" and clean is not None:
        unused = [f"--{name.replace('_', '-')}" for name in _WITHOUT_CLEAN if flags.get(name) is not None]
        if unused:
            console.note(f"note: {', '.join(unused)} changes nothing with --clean: it is the first extra set")
    if method == "pbe" and clean is None and flags.get("refining_fractions") is not None:
        console.note("note: --refining-fractions changes nothing without --clean: --fractions has the rounds then")
    open_output(out, force=force)

    import pbe_fast
    from pbe_fast import runs
    from pbe_fast.engine.precision import resolve_device
    from pbe_fast.models import check_model
    from pbe_fast.report.tables import metrics_table, named_models

    interrupts.check()
    clock = runs.Clock()
    resolve_device(device)
    infected, spec = runs.open_model(model, arch=arch, width=width, mean=mean, std=std)
    runs.require_size({model: spec}, size_given(image_size))
    with clock.phase("reading"):
        sources = runs.purification_sets(
            model,
            train=train,
            clean=clean,
            clean_count=clean_count,
            test=test,
            triggered=triggered,
            image_size=image_size,
            class_names=spec.class_names,
            seed=seed,
            progress=console.progress,
        )
    sets = {name: source.data for name, source in sources.items() if source is not None}
    runs.require_size({model: spec}, runs.sizes_of(sources))
    for data in sets.values():
        check_model(infected, data.image_shape, data.num_classes)
    spec = runs.spec_for(spec, infected, sets["train" if "train" in sets else "clean"])
    console.note(_plan(sets, config, METHOD_NAMES[method]))
    run: dict[str, Any] = {
        "config": config,
        "seed": seed,
        "device": device,
        "precision": precision,
        "progress": console.progress,
    }
    if method == "pbe":
        limit = None if device_memory_limit is None else device_memory_limit << 20
        run |= {"device_memory_limit": limit, "profile": profile}
        result = pbe_fast.purify(infected, sets.get("train"), clean_data=sets.get("clean"), **run)
    else:
        from pbe_fast.defenses import DEFENSES

        result = DEFENSES[method](infected, sets["clean"], train_data=sets.get("train"), **run)
    with clock.phase("evaluation"):
        metrics = {
            name: runs.measure(
                candidate, sets.get("test"), sets.get("triggered"), device=device, progress=console.progress
            )
            for name, candidate in (("infected", infected), ("purified", result.model))
        }
    result.save(
        out,
        spec=spec,
        force=force,
        **metrics,
        onnx=None,
        **({"recipe": recipe} if method == "pbe" else {}),
        seconds=clock.seconds(),
        sha256={"inputs": runs.describe_inputs({"model": model}, sources)},
    )
    report = runs.illustrate(out, result, sets.get("test"), sets.get("triggered"))
    console.note(f"wrote {out}: {', '.join([*report['sha256']['outputs'], 'report.json', 'report.html'])}")
    if result.profile is not None:
        console.note(result.profile.table())
    lines = [metrics_table(named_models(metrics, method))] if "test" in sets else []
    names = next(sets[part] for part in ("train", "clean") if sets.get(part) is not None).class_names
    lines += findings_text(result.history, names)
    lines.append(ranking_text(report["ranking"]) if "ranking" in report else "no training images were given to rank")
    console.result("\n".join(lines), report)


def _plan(sets: Mapping[str, ImageSet], config: object, method: str) -> str:
    train, clean = sets.get("train"), sets.get("clean")
    ranked = f", then ranking {len(train):,} training images" if train is not None else ""
    if not isinstance(config, PurifyConfig):
        return f"{method} with {len(sets['clean']):,} clean images of {sets['clean'].name}{ranked}"
    if clean is None:
        assert train is not None
        return f"no clean set: {len(config.fractions)} rounds over {len(train):,} training images of {train.name}"
    if train is not None and config.refining_fractions:
        further = f"{len(config.refining_fractions)} more on those of {len(train):,} training images that rank clean"
        return f"one round on {len(clean):,} clean images of {clean.name}, {further}"
    return f"one round on {len(clean):,} clean images of {clean.name}{ranked}"
