"""The table of what `pbe_fast.scan` finds in the models of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pbe_fast.engine.files import write_text
from pbe_fast.report.tables import MISSING, table
from pbe_fast.reproduce.cells import BENIGN, Cell, Request, Subject, scan_subjects
from pbe_fast.reproduce.scales import Scale
from pbe_fast.reproduce.store import Store
from pbe_fast.reproduce.tables import ATTACK_NAMES, stale_note

SCAN_TABLE = "table-scan.md"
_SETTINGS = {"all_to_one": "all-to-one", "all_to_all": "all-to-all", "none": "none"}
_HEADER = ["model", "setting", "seed", "ASR %", "verdict", "leads to", "times even", "p", "right"]


def make_scan_table(request: Request, scale: Scale, store: Store) -> str:
    """Every scanned model of the request: what there is, what was found, and whether they are the same; Markdown."""
    lines, entries, right, found_cells, alarms, benign = [], [], 0, 0, 0, 0
    for seed in request.seeds:
        for subject in scan_subjects(request, scale, seed):
            entry = store.read(Cell(subject, "scan"))
            before = store.read(Cell(subject, "before"))
            hit = entry is not None and is_right(subject, entry["metrics"])
            lines.append(_line(subject, entry, before, hit))
            if entry is None:
                continue
            entries.append(entry)
            if subject.attack == BENIGN:
                benign += 1
                alarms += not hit
            else:
                found_cells += 1
                right += hit
    notes = [
        f"- Scale {scale.name}: {scale.note}",
        f"- Found, and with the right target: {right} of {found_cells} infected models. False alarms: {alarms} of "
        f"{benign} benign models. Below p = {scale.scan.significance} it is a backdoor.",
        "- Scanned with the clean images that the defences get; the attack did not see them.",
        *(f"- {note}" for note in stale_note(entries, scale)),
    ]
    return f"## Scan of the infected models\n\n{table(_HEADER, lines)}\n\n" + "\n".join(notes) + "\n"


def save_scan_table(text: str, folder: Path) -> Path:
    """Write ``table-scan.md``."""
    return write_text(folder / SCAN_TABLE, text)


def is_right(subject: Subject, metrics: Mapping[str, Any]) -> bool:
    """Whether a scan says of a model what is true of it."""
    if subject.attack == BENIGN:
        return bool(metrics["verdict"] == "none")
    if metrics["verdict"] != subject.setting:
        return False
    return bool(metrics["target_label"] == subject.target if subject.setting == "all_to_one" else metrics["shift"] == 1)


def _line(subject: Subject, entry: Mapping[str, Any] | None, before: Mapping[str, Any] | None, hit: bool) -> list[str]:
    benign = subject.attack == BENIGN
    name = BENIGN if benign else ATTACK_NAMES[subject.attack]
    setting = MISSING if benign else _SETTINGS[subject.setting]
    asr = MISSING if benign or before is None else f"{100 * before['metrics']['asr']:.1f}"
    start = [name, setting, str(subject.seed), asr]
    if entry is None:
        return [*start, *[MISSING] * 5]
    m = entry["metrics"]
    leads = {"none": MISSING, "all_to_one": str(m["target_label"]), "all_to_all": f"y + {m['shift']}"}[m["verdict"]]
    return [*start, _SETTINGS[m["verdict"]], leads, f"{m['score']:.1f}", f"{m['p_value']:.2g}", "yes" if hit else "no"]
