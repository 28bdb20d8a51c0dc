from __future__ import annotations

from pathlib import Path

import click

from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    console_options,
    device_options,
    image_size_option,
    model_options,
    option,
    path_option,
    size_given,
)
from pbe_fast.cli.shell import Command, Console
from pbe_fast.engine import interrupts

_EXAMPLE = """
pbe-fast evaluate --model infected/ --model purified/ \\
    --test infected/test.npz --triggered infected/triggered.npz
"""


@click.command(cls=Command, short_help="measure ACC and ASR of models", example=_EXAMPLE)
@path_option(
    "--model",
    "models",
    section=INPUT,
    required=True,
    multiple=True,
    help="folder of a model, or a weights file; repeat it to compare models",
)
@option("--test", section=INPUT, required=True, help=f"clean test images: {DATA_HELP}")
@option("--triggered", section=INPUT, help="test images with the trigger, as attack writes them; without it, ACC only")
@image_size_option
@model_options
@device_options("fp32")
@console_options
def evaluate(
    *,
    console: Console,
    models: tuple[Path, ...],
    test: str,
    triggered: str | None,
    image_size: int | None,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    device: str,
    precision: str,
) -> None:
    """Measure models: accuracy, attack success rate, accuracy on triggered images.

    ASR leaves out the images whose true class is the attacker's target; "ASR with target" counts them.
    """
    from pbe_fast import runs
    from pbe_fast.report.tables import metrics_table

    interrupts.check()
    loaded = {path: runs.open_model(path, arch=arch, width=width, mean=mean, std=std) for path in models}
    specs = {path: spec for path, (_, spec) in loaded.items()}
    runs.require_size(specs, size_given(image_size))
    names = runs.shared_names(specs)
    named = runs.name_models(models)
    sources = {
        name: runs.Source.read(origin, image_size=image_size, class_names=names, progress=console.progress)
        for name, origin in (("test", test), ("triggered", triggered))
        if origin is not None
    }
    runs.require_size(specs, runs.sizes_of(sources))
    runs.require_true_labels(sources.get("triggered"))
    sets = {name: source.data for name, source in sources.items()}
    metrics = {
        name: runs.measure(
            loaded[path][0],
            sets["test"],
            sets.get("triggered"),
            device=device,
            precision=precision,
            progress=console.progress,
        )
        for name, path in named.items()
    }
    report = {**metrics, **runs.provenance(named, sources)}
    console.result(metrics_table(metrics), report)
