from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pbe_fast.cli.options import INPUT, OUTPUT, RUN, console_options, device_options, option, path_option
from pbe_fast.cli.shell import EXIT_CHECK, Command, Console
from pbe_fast.engine import interrupts
from pbe_fast.errors import InputError

_WHAT = "What"
_EXAMPLE = """
pbe-fast reproduce --scale smoke --table 1 --figure 6 --figure 7
pbe-fast reproduce --scale cpu --table 1 --seeds 0,1,2 --data images/ --jobs 2
pbe-fast reproduce --scale gpu --table 1 --table 4 --data images/ --out results/
pbe-fast reproduce --scale cpu --table 1 --out results/ --draw-only
"""


def _integers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers with commas between them."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"got {text!r}; accepted: whole numbers with commas between them, such as 0,1,2"
        ) from None


@click.command(cls=Command, short_help="the paper's tables and figures", example=_EXAMPLE)
@option("--table", "tables", section=_WHAT, type=int, multiple=True, metavar="N", help="1, 2, 3, 4 or 5; repeatable")
@option(
    "--figure", "figures", section=_WHAT, type=int, multiple=True, metavar="N", help="1, 3, 4, 5, 6 or 7; repeatable"
)
@option("--scan", section=_WHAT, is_flag=True, help="scan the models of tables 1 and 4, and benign ones")
@option("--theorem", section=_WHAT, is_flag=True, help="check Theorem 1 numerically (in a checkout of the repository)")
@option(
    "--scale",
    section=_WHAT,
    type=click.Choice(("cpu", "gpu", "smoke")),
    default="cpu",
    show_default=True,
    help="gpu: the paper's networks and sizes; cpu: small ones; smoke: digits, to try the way",
)
@option("--seeds", section=_WHAT, default="0", show_default=True, callback=_integers, help="with commas between them")
@option(
    "--targets",
    section=_WHAT,
    callback=_integers,
    help="target labels of figures 1 and 4, one model each  [default: all ten at the gpu scale, else fewer]",
)
@option("--attack", "attacks", section=_WHAT, multiple=True, metavar="NAME", help="only these rows; repeatable")
@option("--defense", "defenses", section=_WHAT, multiple=True, metavar="NAME", help="only these columns; repeatable")
@path_option(
    "--data", section=INPUT, help="folder with NAME-train.parquet and NAME-test.parquet, or torchvision's sets"
)
@path_option("--weights", section=INPUT, help="an ImageNet checkpoint of ResNet-18, for table 3 at the gpu scale")
@path_option(
    "--out", section=OUTPUT, default="runs/reproduce", show_default=True, help="folder of the cells; finished ones stay"
)
@path_option("--drawings", section=OUTPUT, help="folder of the tables and figures  [default: OUT/SCALE]")
@option(
    "--draw-only", section=RUN, is_flag=True, help="train and measure nothing: tables and figures of finished cells"
)
@option("--jobs", section=RUN, type=click.IntRange(1), metavar="N", default=1, show_default=True, help="processes")
@device_options("auto")
@console_options
def reproduce(
    *,
    console: Console,
    tables: tuple[int, ...],
    figures: tuple[int, ...],
    scan: bool,
    theorem: bool,
    scale: str,
    seeds: tuple[int, ...],
    targets: tuple[int, ...] | None,
    attacks: tuple[str, ...],
    defenses: tuple[str, ...],
    data: Path | None,
    weights: Path | None,
    out: Path,
    drawings: Path | None,
    draw_only: bool,
    jobs: int,
    device: str,
    precision: str,
) -> None:
    """Make the paper's tables and figures again, with its own figures beside ours.

    Every model and every defence of it is a cell, one JSON file in OUT/SCALE/cells. What is finished is never made
    again: a run that was stopped goes on where it was, and several runs, on several machines that share OUT, make
    different cells. Exits with 1 if a cell failed.
    """
    if not (tables or figures or scan or theorem):
        raise click.UsageError("nothing to make; accepted: --table N, --figure N, --scan, --theorem")
    from pbe_fast.engine.files import prepare_output
    from pbe_fast.reproduce import Request, find_scale

    chosen = find_scale(scale)
    request = Request(
        tables=tuple(dict.fromkeys(tables)),
        figures=tuple(dict.fromkeys(figures)),
        scan=scan,
        seeds=seeds,
        targets=targets,
        attacks=attacks or None,
        defenses=defenses or None,
    )
    if weights is not None and not weights.is_file():
        raise InputError(
            "--weights", got=f"{weights}, which is no file", accepted="a .safetensors, .pt, .pth or .ckpt file"
        )
    if data is not None and not data.is_dir():
        raise InputError("--data", got=f"{data}, which is no folder", accepted="the folder with the images")

    from pbe_fast.engine.precision import resolve_device
    from pbe_fast.reproduce import Job, Store, cells_of, make_cells, make_table
    from pbe_fast.reproduce.figures import draw_figure
    from pbe_fast.reproduce.scanned import make_scan_table, save_scan_table

    interrupts.check()
    resolve_device(device)
    store, cells = Store(out / scale), cells_of(request, chosen)
    unmade = dict.fromkeys(cell.subject.data for cell in cells if not store.done(cell))
    if data is None and not draw_only and (real := [name for name in unmade if name != "digits"]):
        raise InputError("--data", got=f"none, for the images of {', '.join(real)}", accepted="the folder with them")
    folder = prepare_output(out / scale, force=True)
    drawn = folder if drawings is None else prepare_output(drawings, force=True)
    there = sum(store.done(cell) for cell in cells)
    console.note(f"{len(cells)} cells at scale {scale}, {there} of them finished; {folder}")
    failed: dict[str, str] = {}
    if not draw_only:
        job = Job(scale=chosen, root=folder, data=data, weights=weights, device=device, precision=precision)
        failed = make_cells(cells, job, jobs=jobs, show_progress=console.progress, note=console.note)
    texts, written, report = [], [], _report(cells, store, failed)
    for number in request.tables:
        table = make_table(number, request, chosen, store)
        written += table.save(drawn)
        texts.append(table.markdown())
    if scan:
        texts.append(make_scan_table(request, chosen, store))
        written.append(save_scan_table(texts[-1], drawn))
    for number in request.figures:
        path = draw_figure(number, drawn, request, chosen, store)
        if path is None:
            console.note(f"figure {number}: no cell of it is finished, nothing is drawn")
        else:
            written.append(path)
    holds = True
    if theorem:
        from pbe_fast.reproduce.theorem import check_theorem

        holds, text = check_theorem(out / "theorem")
        texts.append(text)
        written += [out / "theorem" / name for name in ("theorem.csv", "theorem.png")]
        report["theorem_holds"] = holds
    report["written"] = [str(path) for path in written]
    console.note(f"wrote {', '.join(map(str, written)) or 'nothing'}")
    console.result("\n".join(texts).rstrip(), report)
    if failed or not holds:
        click.get_current_context().exit(EXIT_CHECK)


def _report(cells: list[Any], store: Any, failed: dict[str, str]) -> dict[str, Any]:
    missing = [cell.name for cell in cells if not store.done(cell)]
    return {"cells": len(cells), "finished": len(cells) - len(missing), "missing": missing, "failed": failed}
