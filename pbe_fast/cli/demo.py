from __future__ import annotations

from pathlib import Path

import click

from pbe_fast.cli.options import (
    OUTPUT,
    console_options,
    device_options,
    force_option,
    option,
    path_option,
    seed_option,
)
from pbe_fast.cli.shell import EXIT_CHECK, Command, Console, open_output
from pbe_fast.cli.texts import onnx_text
from pbe_fast.engine import interrupts

_EXAMPLE = """
pbe-fast demo
pbe-fast demo --attack badnets --seed 1 --out runs/badnets
"""


@click.command(cls=Command, short_help="all of it on digits, in two minutes", example=_EXAMPLE)
@option(
    "--attack",
    section="Attack",
    type=click.Choice(("blend", "badnets", "sig", "wanet", "input_aware")),
    default="blend",
    show_default=True,
    help="how the model is infected",
)
@path_option("--out", section=OUTPUT, default="runs/demo", show_default=True, help="folder for what the demo makes")
@force_option
@seed_option
@device_options("auto")
@console_options
@click.pass_context
def demo(
    ctx: click.Context, *, console: Console, attack: str, out: Path, force: bool, seed: int, device: str, precision: str
) -> None:
    """Infect a small model, purify it, export it, verify it: two minutes, nothing to download.

    Uses scikit-learn's digits. Purifies with 140 clean digits and without any, and prints what each is worth beside
    plain fine-tuning on the same 140. Writes the purified model, model.onnx, ranking.csv, figure.png, report.html and
    report.json.
    """
    open_output(out, force=force)

    from pbe_fast.demo import run_demo
    from pbe_fast.report.tables import metrics_table
    from pbe_fast.runs import models_of

    interrupts.check()
    report = run_demo(
        out,
        attack=attack,
        seed=seed,
        device=device,
        precision=precision,
        force=force,
        progress=console.progress,
        note=console.note,
    )
    console.note("")
    console.result(f"{metrics_table(models_of(report))}\n\n{onnx_text(report['onnx'])}", report)
    console.note(f"\nwrote {out}: {', '.join(sorted([*report['sha256']['outputs'], 'report.html', 'report.json']))}")
    console.note(f"{report['seconds']['total']:.0f} s; open {out / 'report.html'} for the rest")
    if not report["onnx"]["ok"]:
        for problem in report["onnx"]["problems"]:
            click.echo(f"differs: {problem}", err=True)
        ctx.exit(EXIT_CHECK)
