"""docs/benchmarks.md and its figures from the result files in bench/results/speed: `make bench-report`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import FOLDER, read_results

from pbe_fast.engine.files import atomic_write, write_text
from pbe_fast.report.canvas import BAD, GOOD, INK, LINE, SOFT
from pbe_fast.report.tables import table

DOCS = Path(__file__).parents[1] / "docs"
# Okabe and Ito's colours, one for each line of a panel.
COLOURS = (GOOD, BAD, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)

INTRO = """# Benchmarks

Written by `make bench-report` from `bench/results/speed`; `make bench` (a CPU, under 15 minutes on two cores) and
`make bench-gpu` measure. In each case all contenders take turns in one process on fresh inputs, compilation and warm-up
come before, and values are compared before times. Times are medians over the turns, with their interquartile range;
ratios are medians of the turns' ratios. *Strengthened* peers are frozen, channels_last, computed in bfloat16 and
compiled. The peak is that of a large matrix product in the same format on the same threads, measured in the same run; a
convolution can exceed it a little. Every case is shown as it was measured last. How each is set up stands at the head
of its file in `bench/speed`."""


def main() -> None:
    """Writes the page and its figures."""
    results = read_results()
    if not results:
        sys.exit(f"error: no results; got an empty {FOLDER}, accepted: the files that `make bench` writes there")
    write_report(results, DOCS)


def write_report(results: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """benchmarks.md with a section for each kind of machine, and benchmarks-*.png beside it.

    Args:
        results: As `read_results` has them, oldest first.
        folder: Where to write.
    """
    histories: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result["scale"] != "tiny":
            kind = f"{result['kind']}{'' if result['scale'] == 'normal' else ', full scale'}"
            histories.setdefault(kind, []).append(result)
    blocks = [INTRO]
    for number, (kind, history) in enumerate(histories.items()):
        blocks += _section(kind, history, folder, "benchmarks" if number == 0 else f"benchmarks-{number + 1}")
    return write_text(folder / "benchmarks.md", "\n\n".join(blocks) + "\n")


def last_measured(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every case as it was measured last, with ``when``: a run of a few cases says nothing of the others."""
    cases: dict[str, dict[str, Any]] = {}
    for result in history:
        for case in result["cases"]:
            commit = str(case.get("commit") or result["commit"])[:12]
            cases[case["name"]] = {**case, "when": f"{result['date'][:10]}, commit {commit}"}
    return list(cases.values())


def _section(kind: str, history: Sequence[Mapping[str, Any]], folder: Path, stem: str) -> list[str]:
    cases, result = last_measured(history), history[-1]
    fields = [case for case in cases if "runs" in case]
    machine, versions = result["machine"], result["versions"]
    blocks = [
        f"## {kind}",
        f"Seed {result['seed']}, {machine['cores']} cores, torch {versions['torch']}, Python {versions['python']}.",
    ]
    # Of one case that was measured once its table says it all.
    if fields and len(fields) + len(history) > 2:
        draw_ratios(folder / f"{stem}-ratios.png", fields)
        draw_shares(folder / f"{stem}-share.png", fields)
        draw_history(folder / f"{stem}-history.png", history)
        blocks += [
            f"![Ours against each peer: how many times faster]({stem}-ratios.png)",
            f"![Share of the measured peak of matrix products]({stem}-share.png)",
            f"![Throughput by commit]({stem}-history.png)",
        ]
    for case in fields:
        blocks += [f"### {title(case)}", f"{case['when']}.", _runs_table(case)]
        if "quality" in case:
            if len(seeds := case.get("seeds", [])) > 1:
                blocks.append(f"Means over the seeds {', '.join(map(str, seeds))}:")
            blocks.append(_quality_table(case))
        blocks += _shortfalls(case)
    growth = [case for case in cases if "slope" in case]
    for case in growth:
        peaks = case["peak_mib"]
        rows = [[f"{int(n):,}", f"{seconds:.2f}", _or_dash(peaks[n])] for n, seconds in case["seconds"].items()]
        blocks += [
            "### Growth with the number of images",
            f"{case['when']}. Slope of log(seconds) by log(N): {case['slope']:.3f} (goal: at most "
            f"{case['promised_slope']}).",
            table(["images", "seconds", "peak MiB"], rows),
        ]
    whole = [case for case in cases if "goal_seconds" in case]
    if whole:
        rows = [[k, f"{s:.2f}", f"{c['goal_seconds']:.1f}", c["when"]] for c in whole for k, s in c["seconds"].items()]
        blocks += ["### Whole runs", table(["run", "seconds", "goal", "measured"], rows)]
    operations = [case for case in cases if "ratio" in case]
    if operations:
        rows = [
            [
                case.get("quick") or plain_name(case["name"]),
                f"{case['ours_ms']:.2f}",
                f"{case['ours_iqr_ms']:.2f}",
                f"{case['peer_ms']:.2f}",
                f"{case['ratio']:.2f}",
                f"{case['ratio_heap_kept']:.2f}" if "ratio_heap_kept" in case else "–",
                f"{case['share_of_copy']:.0%}" if "share_of_copy" in case else "–",
                case["when"],
            ]
            for case in operations
        ]
        header = ["operation", "ours ms", "IQR", "peer ms", "ratio", "heap kept", "share of copy", "measured"]
        said = (
            "*Heap kept*: the ratio where freed memory stays in the process, which helps whoever allocates more "
            "(`bench/speed/racing.py`)."
        )
        blocks += ["### Single operations, and the ratios that CI compares", table(header, rows), said]
    return blocks


def title(case: Mapping[str, Any]) -> str:
    """A case in words: its test, its network, its images."""
    test, _, parameters = str(case["name"]).removeprefix("test_").rstrip("]").partition("[")
    for said in (case["network"], "cpu", "cuda"):
        parameters = parameters.replace(said, "")
    words = [test.replace("_", " "), *filter(None, [parameters.strip("-")])]
    size = f", {case['images']:,} images" if "images" in case else ""
    side = f" of {case['side']} px" if "side" in case else ""
    return f"{', '.join(words)}: {case['network']}{size}{side}"


def plain_name(name: str) -> str:
    """``test_pgd[cpu-preact-16]`` without what only pytest needs."""
    return name.removeprefix("test_").replace("_", " ").replace("[", " (").replace("]", ")")


def _runs_table(case: Mapping[str, Any]) -> str:
    ours = [name for name in case["runs"] if name.startswith("ours")]
    rows = []
    for name, run in case["runs"].items():
        ratios = [_or_dash(case["ratios"].get(f"{one} / {name}"), "{:.2f}") for one in ours]
        rows.append(
            [
                name,
                run["dtype"],
                f"{run['rate']:,.4g}",
                f"{run['seconds']:.3f}",
                f"{run['iqr_seconds']:.3f}",
                f"{run['share_of_peak']:.0%}",
                *ratios,
            ]
        )
    header = ["", "products", case["unit"], "seconds", "IQR", "of peak", *(f"{one}: times faster" for one in ours)]
    return table(header, rows)


def _quality_table(case: Mapping[str, Any]) -> str:
    rows = {"infected": case["infected"], **case["quality"]}
    return table(["", "ACC %", "ASR %"], [[name, f"{q['acc']:.1f}", f"{q['asr']:.1f}"] for name, q in rows.items()])


def _shortfalls(case: Mapping[str, Any]) -> list[str]:
    missed = [
        f"{pair}: {case['ratios'][pair]:.3f}, promised {least:g}"
        for pair, least in case["promised"].items()
        if case["ratios"][pair] < least
    ]
    best = max(run["share_of_peak"] for name, run in case["runs"].items() if name.startswith("ours"))
    if best < case["promised_share"]:
        missed.append(f"share of peak: {best:.0%}, promised {case['promised_share']:.0%}")
    return [f"Falls short: {'; '.join(missed)}."] if missed else []


def _or_dash(value: float | None, style: str = "{:,.0f}") -> str:
    return "–" if value is None else style.format(value)


def draw_ratios(path: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """How many times faster the best of ours is than each peer, a panel per case; left of the line it is slower."""
    rows = []
    for case in cases:
        by_peer: dict[str, float] = {}
        for pair, value in case["ratios"].items():
            peer = pair.partition(" / ")[2]
            by_peer[peer] = max(by_peer.get(peer, 0.0), value)
        rows.append((title(case), by_peer))
    _draw_bars(
        path, rows, "times faster", mark=1.0, style="{:.2f}", colour=lambda _, value: GOOD if value >= 1 else BAD
    )


def draw_shares(path: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """The share of the measured peak that everyone reaches, each in its own format."""
    rows = [(title(case), {name: 100 * run["share_of_peak"] for name, run in case["runs"].items()}) for case in cases]
    _draw_bars(
        path,
        rows,
        "% of the peak of matrix products in the same format",
        mark=100.0,
        style="{:.0f}",
        colour=lambda name, _: GOOD if name.startswith("ours") else SOFT,
    )


def _draw_bars(
    path: Path,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    label: str,
    *,
    mark: float,
    style: str,
    colour: Callable[[str, float], str],
) -> None:
    heights = [len(bars) + 0.2 for _, bars in rows]
    figure = Figure(figsize=(9.6, 0.24 * sum(heights) + 0.55 * len(rows) + 0.5), dpi=120, layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (heading, bars) in zip(panels, rows, strict=True):
        names = list(bars)[::-1]
        values = [bars[name] for name in names]
        colours = [colour(name, bars[name]) for name in names]
        drawn = axes.barh(names, values, color=colours, height=0.7)
        axes.bar_label(drawn, [style.format(value) for value in values], padding=3, fontsize=8, color=INK)
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
        axes.margins(x=0.08)
        axes.set_ylim(-0.6, len(names) - 0.4)
        _plain(axes)
    panels[-1].set_xlabel(label)
    _save(figure, path)


def draw_history(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Throughput of the default of ours by date and commit, relative to the first record of each case."""
    figure = Figure(figsize=(9.6, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    history = [result for result in history if any("runs" in case for case in result["cases"])]
    labels = [f"{result['date'][:10]}\n{str(result['commit'])[:7]}" for result in history]
    series: dict[str, dict[int, float]] = {}
    for place, result in enumerate(history):
        for case in result["cases"]:
            for name, run in case.get("runs", {}).items():
                if name.startswith("ours") and "compiled" not in name:
                    series.setdefault(f"{plain_name(case['name'])}, {name}", {})[place] = run["rate"]
    for number, (name, rates) in enumerate(series.items()):
        first = next(iter(rates.values()))
        axes.plot(
            list(rates),
            [rate / first for rate in rates.values()],
            marker="os^Dv"[number // len(COLOURS) % 5],
            color=COLOURS[number % len(COLOURS)],
            label=f"{name} (first: {_three_digits(first)})",
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, max(0.5, len(labels) - 0.5))
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("throughput by the first record's")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    _plain(axes)
    _save(figure, path)


def _three_digits(value: float) -> str:
    """1,970 and 0.0412, and no power of ten."""
    return f"{float(f'{value:.3g}'):,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=8)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
