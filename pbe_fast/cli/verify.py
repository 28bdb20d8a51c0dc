from __future__ import annotations

from pathlib import Path

import click

from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    RUN,
    SEED,
    console_options,
    image_size_option,
    model_options,
    number,
    option,
    path_option,
    size_given,
)
from pbe_fast.cli.shell import EXIT_CHECK, Command, Console
from pbe_fast.cli.texts import onnx_text
from pbe_fast.engine import interrupts
from pbe_fast.errors import InputError

_EXAMPLE = """
pbe-fast verify --onnx purified/model.onnx --model purified/ \\
    --test infected/test.npz --triggered infected/triggered.npz
"""


@click.command(cls=Command, short_help="compare an ONNX file with its model", example=_EXAMPLE)
@path_option("--onnx", section=INPUT, required=True, help="the file that export wrote")
@path_option("--model", section=INPUT, required=True, help="the model that it should be: a folder, or a weights file")
@option("--test", section=INPUT, required=True, help=f"clean test images: {DATA_HELP}")
@option("--triggered", section=INPUT, help="test images with the trigger, as attack writes them")
@image_size_option
@model_options
@option(
    "--tolerance",
    section=RUN,
    type=number,
    default=1e-4,
    show_default=True,
    help="largest difference of a logit that is accepted",
)
@option("--seed", section=RUN, type=SEED, metavar="N", default=0, help="of the random images")
@console_options
@click.pass_context
def verify(
    ctx: click.Context,
    *,
    console: Console,
    onnx: Path,
    model: Path,
    test: str,
    triggered: str | None,
    image_size: int | None,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    tolerance: float,
    seed: int,
) -> None:
    """Compare a saved ONNX file with its model: logits, predictions, ACC and ASR.

    Runs the file in onnxruntime, on every provider that this machine has, on the test images and on random ones.
    Exits with 1 when anything differs. The figures go into the model's report.json, if its folder has one.
    """
    from pbe_fast import runs
    from pbe_fast.export import verify_onnx
    from pbe_fast.export.graph import read_graph

    interrupts.check()
    network, spec = runs.open_model(model, arch=arch, width=width, mean=mean, std=std)
    runs.require_size({model: spec}, size_given(image_size))
    sources = {
        name: runs.Source.read(origin, image_size=image_size, class_names=spec.class_names, progress=console.progress)
        for name, origin in (("test", test), ("triggered", triggered))
        if origin is not None
    }
    runs.require_true_labels(sources.get("triggered"))
    # Of images that fit neither the file nor the model, they are what is wrong.
    shape, wanted = sources["test"].data.image_shape, spec.image_shape if spec.image_size is not None else None
    if wanted is not None and shape != wanted and onnx.is_file():
        taken = read_graph(onnx.read_bytes(), str(onnx)).image_shape
        if shape != taken:
            accepted = f"{taken}, as the file takes them (--image-size PIXELS resizes)"
            raise InputError(f"image shape of {test}", got=shape, accepted=accepted)
    found = verify_onnx(
        onnx,
        network,
        sources["test"].data,
        triggered=sources["triggered"].data if "triggered" in sources else None,
        tolerance=tolerance,
        seed=seed,
        progress=console.progress,
    )
    if runs.add_to_report(model, onnx=found.to_dict()):
        console.note(f"added to {model / 'report.json'}")
    report = {"onnx": found.to_dict(), **runs.provenance({"model": model}, sources)}
    console.result(onnx_text(found.to_dict()), report)
    for problem in found.problems:
        click.echo(f"differs: {problem}", err=True)
    if not found.ok:
        ctx.exit(EXIT_CHECK)
