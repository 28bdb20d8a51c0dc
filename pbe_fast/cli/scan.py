from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    OUTPUT,
    RUN,
    config_options,
    console_options,
    device_options,
    force_option,
    image_size_option,
    model_options,
    option,
    path_option,
    seed_option,
    size_given,
    with_values,
)
from pbe_fast.cli.shell import EXIT_CHECK, Command, Console, open_output
from pbe_fast.config import ScanConfig
from pbe_fast.engine import interrupts

_EXAMPLE = """
pbe-fast scan --model infected/ --data infected/train.npz --out scan/
pbe-fast scan --model net.pt --arch mymodels:make_net --data images/ --fail-on-backdoor
"""


@click.command(cls=Command, short_help="is there a backdoor, and where does it lead", example=_EXAMPLE)
@path_option("--model", section=INPUT, required=True, help="folder of a model, or a weights file")
@option("--data", section=INPUT, required=True, help=f"clean images, or those it was trained on: {DATA_HELP}")
@image_size_option
@model_options
@config_options(ScanConfig(), "Scan")
@path_option("--out", section=OUTPUT, help="folder for scan.png and report.json; without it, nothing is written")
@force_option
@option(
    "--fail-on-backdoor", section=RUN, is_flag=True, help="exit with 1 if a backdoor is found, for use in a pipeline"
)
@seed_option
@device_options("auto")
@console_options
def scan(
    *,
    console: Console,
    model: Path,
    data: str,
    image_size: int | None,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    out: Path | None,
    force: bool,
    fail_on_backdoor: bool,
    seed: int,
    device: str,
    precision: str,
    **flags: Any,
) -> None:
    """Look for a backdoor: attack images, and see which labels they end up at.

    A benign model's adversarial images spread over the labels; those of an infected one tend to one label (all-to-one)
    or from y to y + s (all-to-all). The p-value says how often a benign model looks as suspicious. Exits with 0
    whatever is found, or with --fail-on-backdoor with 1 if there is a backdoor.
    """
    config = with_values(ScanConfig(), flags)
    if out is not None:
        open_output(out, force=force)

    import pbe_fast
    from pbe_fast import runs
    from pbe_fast.engine.precision import resolve_device

    interrupts.check()
    resolve_device(device)
    network, spec = runs.open_model(model, arch=arch, width=width, mean=mean, std=std)
    runs.require_size({model: spec}, size_given(image_size))
    source = runs.Source.read(data, image_size=image_size, class_names=spec.class_names, progress=console.progress)
    runs.require_size({model: spec}, runs.sizes_of({"data": source}))
    console.note(f"attacking up to {config.images:,} of {len(source.data):,} images of {source.data.name}")
    found = pbe_fast.scan(
        network,
        source.data,
        config=config,
        seed=seed,
        device=device,
        precision=precision,
        progress=console.progress,
    )
    inputs = runs.provenance({"model": model}, {"data": source})
    if out is not None:
        found.save(out, force=force, **inputs)
        console.note(f"wrote {out}: scan.png, report.json")
    console.result(found.summary(), {"scan": found.to_dict(), **inputs})
    if found.found and fail_on_backdoor:
        click.get_current_context().exit(EXIT_CHECK)
