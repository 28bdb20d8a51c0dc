from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from pbe_fast.cli.options import (
    INPUT,
    MODEL,
    OUTPUT,
    console_options,
    force_option,
    model_options,
    option,
    path_option,
    size_given,
)
from pbe_fast.cli.shell import Command, Console, open_file
from pbe_fast.engine import interrupts
from pbe_fast.errors import InputError

_EXAMPLE = """
pbe-fast export --model purified/
pbe-fast export --model net.pt --arch torchvision:resnet18 --image-size 224 --out net.onnx
"""


@click.command(cls=Command, short_help="write a model as an ONNX file", example=_EXAMPLE)
@path_option("--model", section=INPUT, required=True, help="folder of a model, or a weights file")
@model_options
@option(
    "--image-size",
    section=MODEL,
    type=click.IntRange(1),
    metavar="PIXELS",
    help="height and width of its images  [default: as its config.json says]",
)
@path_option("--out", section=OUTPUT, help="the file  [default: model.onnx in the folder of the model]")
@option("--opset", section=OUTPUT, type=click.INT, default=20, show_default=True, help="version of the ONNX operators")
@force_option
@console_options
def export(
    *,
    console: Console,
    model: Path,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    image_size: int | None,
    out: Path | None,
    opset: int,
    force: bool,
) -> None:
    """Write a model as one ONNX file, its pixel normalisation inside.

    The file takes float32 images (batch, C, H, W) in [0, 1] and returns logits. `pbe-fast verify` then compares it
    with the model.
    """
    if out is None:
        out = model / "model.onnx" if model.is_dir() else model.with_suffix(".onnx")
    open_file(out, force=force)

    from pbe_fast import runs
    from pbe_fast.export import export_onnx

    interrupts.check()
    network, spec = runs.open_model(model, arch=arch, width=width, mean=mean, std=std)
    runs.require_size({model: spec}, size_given(image_size))
    if spec.image_size is None and image_size is not None:
        spec = dataclasses.replace(spec, image_size=(image_size, image_size))
    if spec.image_size is None:
        raise InputError(f"image size of {model}", got="none in a config.json", accepted="--image-size PIXELS")
    console.note(f"exporting {spec.arch} for images {spec.image_shape}")
    export_onnx(network, out, image_shape=spec.image_shape, metadata={"model": json.dumps(spec.to_dict())}, opset=opset)
    report = runs.provenance({"model": model}, {}, out)
    console.result(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB)", report)
