"""A run as one HTML page that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pbe_fast.engine.files import write_text
from pbe_fast.errors import InputError
from pbe_fast.report.style import CSS
from pbe_fast.report.tables import COLUMNS, MISSING, model_name, named_models, percent

# Keys of a report that have a section of their own; whatever else it holds is printed under "Run".
MODELS = ("infected", "fine_tuned", "purified", "purified_no_clean")
SECTIONS = {"onnx": "ONNX file", "config": "Options", "machine": "Machine", "versions": "Versions", "sha256": "SHA-256"}
# Fractions in [0, 1], printed in percent.
FRACTIONS = (
    "acc", "asr", "asr_with_target", "recovered_acc", "extra_set_poison_rate", "acc_model", "asr_model",
    "held_out_acc", "held_out_acc_before",
)  # fmt: skip
# Up to here the page shows the attack success as erased; the figure itself stands beside it.
ERASED_ASR = 0.05
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_html(
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    figures: Sequence[Path] = (),
    thumbnails: Sequence[Path] = (),
) -> None:
    """Write a run's page.

    Args:
        path: Where to write; the page appears once it is whole.
        report: What `report.json` holds: metrics by model (``infected``, ``purified``, ...), ``rounds``, ``onnx``,
            ``seconds``, ``config``, ``seed``, ``versions``, ``machine``, ``sha256``. All but ``infected`` or
            ``purified`` may be missing; unknown keys are shown as they are.
        figures: PNG files to put into the page.
        thumbnails: Small ones, such as recovered triggers, to stand side by side under their names.

    Raises:
        InputError: A report without a model in it, or a figure that is not a PNG file.
        OutputError: ``path`` cannot be written.
    """
    models = {key: report[key] for key in MODELS if isinstance(report.get(key), Mapping)}
    if not models:
        raise InputError("report", got=f"the keys {sorted(report)}", accepted=f"at least one of {', '.join(MODELS)}")
    method = str(report.get("method", "pbe"))
    sections = [
        _cards(models, report),
        "".join(_picture(Path(figure)) for figure in figures),
        _section("Models, %", _models_table(named_models(models, method))),
    ]
    if thumbnails:
        row = "".join(_picture(Path(picture), named=True) for picture in thumbnails)
        sections.append(_section("Recovered triggers", f'<div class="thumbnails">{row}</div>'))
    if report.get("rounds"):
        sections.append(_section("Rounds" if method == "pbe" else "Steps", _rounds_table(report["rounds"])))
    pairs = [_section(title, _definitions(report[key])) for key, title in SECTIONS.items() if report.get(key)]
    shown = {*MODELS, *SECTIONS, "rounds"}
    rest = {key: value for key, value in report.items() if key not in shown}
    if rest:
        pairs.append(_section("Run", _definitions(rest)))
    sections.append(f'<div class="columns">{"".join(pairs)}</div>')
    everything = json.dumps(report, indent=2, ensure_ascii=False, default=str)
    sections.append(f"<details><summary>The whole report as JSON</summary><pre>{escape(everything)}</pre></details>")
    write_text(path, _page("Purification report", sections))


def _page(title: str, sections: Iterable[str]) -> str:
    # The policy makes the promise checkable: the browser itself refuses to load anything from elsewhere.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _cards(models: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    """The verdict: attack success and accuracy before and after, and whether the file is the model."""
    after = models.get("purified", models.get("purified_no_clean", {}))
    before = models.get("infected", {})
    cards = []
    for key, label in (("asr", "attack success"), ("acc", "accuracy")):
        figures = [percent(m.get(key)) for m in (before, after) if m]
        if any(figure != MISSING for figure in figures):
            mood = _mood(after[key] <= ERASED_ASR) if key == "asr" and after.get(key) is not None else ""
            cards.append((label, f"{' → '.join(figures)} %", mood))
    onnx = report.get("onnx")
    if isinstance(onnx, Mapping):
        ok = onnx.get("ok", onnx.get("argmax_agreement") == 1.0)
        cards.append(("ONNX file against the model", "same" if ok else "differs", _mood(ok)))
    if isinstance(report.get("rounds"), Sequence) and report["rounds"] and report.get("method", "pbe") == "pbe":
        by_run = Counter(entry.get("run") for entry in report["rounds"])
        cards.append(("rounds", " and ".join(map(str, by_run.values())), ""))
    items = "".join(
        f'<div class="card {mood}"><div class="value">{escape(value)}</div>'
        f'<div class="label">{escape(label)}</div></div>'
        for label, value, mood in cards
    )
    return f'<div class="cards">{items}</div>'


def _mood(good: bool) -> str:
    return "good" if good else "bad"


def _picture(path: Path, *, named: bool = False) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("figure", got=f"{path} ({error.strerror})", accepted="a PNG file") from error
    if not data.startswith(PNG_SIGNATURE):
        raise InputError("figure", got=f"{path}, which is no PNG", accepted="a PNG file")
    source = base64.b64encode(data).decode()
    name = escape(path.stem.replace("_", " "))
    caption = f"<figcaption>{name}</figcaption>" if named else ""
    return f'<figure><img alt="{name}" src="data:image/png;base64,{source}">{caption}</figure>'


def _models_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [key for key in COLUMNS if any(values.get(key) is not None for values in models.values())]
    rows = [[model_name(name, models), *(percent(v.get(key)) for key in columns)] for name, v in models.items()]
    return _table(["", *(COLUMNS[key].removesuffix(" %") for key in columns)], rows)


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """One line per round, a column for every key that any of them has; nested ones become "seconds: rank"."""
    flat = [dict(_flatten(values)) for values in rounds]
    columns = list(dict.fromkeys(key for values in flat for key in values))
    return _table(columns, [[_spell(key, values.get(key)) for key in columns] for values in flat])


def _definitions(values: Any) -> str:
    if not isinstance(values, Mapping):
        return f"<p>{escape(_spell('', values))}</p>"
    rows = [f"<tr><th>{escape(key)}</th><td>{escape(_spell(key, value))}</td></tr>" for key, value in _flatten(values)]
    return f'<div class="scroll"><table class="pairs">{"".join(rows)}</table></div>'


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}: ")
        else:
            yield name, value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _spell(key: str, value: Any) -> str:
    """A value as people read it: fractions in percent, other numbers to four digits."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        # An extra set of which 0.02 % is poisoned is not one without a poisoned image.
        return f"{100 * value:.3g} %" if key.replace(" ", "_") in FRACTIONS else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 1000 and key != "seed" else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_spell(key, item) for item in value) or "none"
    return str(value)
