from __future__ import annotations

from pathlib import Path

import click

from pbe_fast.cli.options import (
    DATA_HELP,
    INPUT,
    OUTPUT,
    console_options,
    device_options,
    force_option,
    image_size_option,
    model_options,
    option,
    path_option,
    size_given,
)
from pbe_fast.cli.shell import Command, Console, open_file
from pbe_fast.cli.texts import ranking_text
from pbe_fast.engine import interrupts

_EXAMPLE = """
pbe-fast rank --infected infected/ --purified purified/ --data infected/train.npz --out ranking.csv
"""


@click.command(cls=Command, short_help="rank images by two models (Eq. 9)", example=_EXAMPLE)
@path_option("--infected", section=INPUT, required=True, help="the model as it was: a folder, or a weights file")
@path_option("--purified", section=INPUT, required=True, help="the model as it is now, likewise")
@option("--data", section=INPUT, required=True, help=f"images to rank: {DATA_HELP}")
@image_size_option
@model_options
@path_option("--out", section=OUTPUT, required=True, help="CSV file: index, label, score, suspected")
@force_option
@device_options("auto")
@console_options
def rank(
    *,
    console: Console,
    infected: Path,
    purified: Path,
    data: str,
    image_size: int | None,
    arch: str | None,
    width: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    out: Path,
    force: bool,
    device: str,
    precision: str,
) -> None:
    """Rank images by how much a purification changed their logits (Eq. 9).

    The most suspicious image comes first. Works with two models of any origin, so also on images that purify has not
    seen.
    """
    open_file(out, force=force)

    from pbe_fast import runs
    from pbe_fast.result import plain, summarize, write_ranking

    interrupts.check()
    opened = {path: runs.open_model(path, arch=arch, width=width, mean=mean, std=std) for path in (infected, purified)}
    specs = {path: spec for path, (_, spec) in opened.items()}
    runs.require_size(specs, size_given(image_size))
    names = runs.shared_names(specs)
    source = runs.Source.read(data, image_size=image_size, class_names=names, progress=console.progress)
    runs.require_size(specs, runs.sizes_of({"data": source}))
    ranking = runs.rank_with(
        opened[infected][0],
        opened[purified][0],
        source.data,
        device=device,
        precision=precision,
        progress=console.progress,
    )
    write_ranking(out, ranking, source.data)
    summary = plain(summarize(ranking, source.data))
    report = runs.provenance({"infected": infected, "purified": purified}, {"data": source}, out)
    console.note(f"wrote {out}")
    console.result(ranking_text(summary), {"ranking": summary, **report})
