"""Tables 1 to 5, laid out like the paper's, with its figures beside ours."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbe_fast.engine.files import atomic_write, write_text
from pbe_fast.report.tables import MISSING, table
from pbe_fast.reproduce.cells import DEFENSES, FEATURE_TABLE, TABLES, Cell, Request, subject_of, table_panels
from pbe_fast.reproduce.paper import METRICS, paper_distance, paper_value
from pbe_fast.reproduce.scales import Scale, of_task
from pbe_fast.reproduce.store import Store

ATTACK_NAMES = {
    "badnets": "BadNets",
    "blend": "Blend",
    "sig": "SIG",
    "input_aware": "DynamicAtt",
    "wanet": "WaNet",
}
DEFENSE_NAMES = {
    "before": "Before",
    "ft": "Fine-tuning",
    "fp": "Fine-pruning",
    "nad": "NAD",
    "nc": "Neural Cleanse",
    "anp": "ANP",
    "pbe_no_clean": "PBE (w/o clean)",
    "pbe": "PBE (w/ clean)",
}
KINDS = ("ours", "paper", "difference")


@dataclass(frozen=True)
class Summary:
    """One figure over the seeds: ``mean`` and ``std`` (n - 1) of ``values``, None where there are too few."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """None without a finished cell."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """None with fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def spell(self, seeds: int) -> str:
        """As in "94.20 ± 0.15"; with the number of seeds where it is not all of ``seeds``."""
        if self.mean is None:
            return MISSING
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread}" + (f" (n={len(self.values)})" if len(self.values) < seeds else "")


@dataclass(frozen=True, eq=False)
class ReproducedTable:
    """A table: for each row and column our figures and the paper's.

    Attributes:
        number: Of the paper's table.
        title: What it shows.
        rows: Names by key.
        columns: Names by key.
        ours: By row and column.
        paper: Likewise; None where it has none.
        seeds: How many were asked for.
        notes: What is to be known of it.
    """

    number: int
    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    ours: Mapping[tuple[str, str], Summary]
    paper: Mapping[tuple[str, str], float | None]
    seeds: int
    notes: Sequence[str]

    def difference(self, row: str, column: str) -> float | None:
        """Ours minus the paper's; None where either is missing."""
        mean, theirs = self.ours[row, column].mean, self.paper[row, column]
        return None if mean is None or theirs is None else mean - theirs

    def cells(self, row: str, kind: str) -> list[str]:
        """The line of a row: "ours", "paper" or "difference"."""
        if kind == "ours":
            return [self.ours[row, column].spell(self.seeds) for column in self.columns]
        values = [
            self.paper[row, column] if kind == "paper" else self.difference(row, column) for column in self.columns
        ]
        form = ".2f" if kind == "paper" else "+.2f"
        return [MISSING if value is None else f"{value:{form}}" for value in values]

    def markdown(self) -> str:
        """A heading, the table, and the notes."""
        header = ["", "", *self.columns.values()]
        lines = [
            [name if i == 0 else "", kind, *self.cells(row, kind)]
            for row, name in self.rows.items()
            for i, kind in enumerate(KINDS)
        ]
        notes = "\n".join(f"- {note}" for note in self.notes)
        return f"## Table {self.number}. {self.title}\n\n{table(header, lines)}\n\n{notes}\n"

    def save(self, folder: Path) -> list[Path]:
        """Write ``table-N.md`` and ``table-N.csv``; in the latter means and deviations have lines of their own."""
        markdown = write_text(folder / f"table-{self.number}.md", self.markdown())
        path = folder / f"table-{self.number}.csv"
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["row", "figure", *self.columns.values()])
            for row, name in self.rows.items():
                summaries = [self.ours[row, column] for column in self.columns]
                figures: dict[str, Sequence[float | None]] = {
                    "mean": [s.mean for s in summaries],
                    "std": [s.std for s in summaries],
                    "seeds": [len(s.values) for s in summaries],
                    "paper": [self.paper[row, column] for column in self.columns],
                    "difference": [self.difference(row, column) for column in self.columns],
                }
                for kind, values in figures.items():
                    shown = ["" if v is None else v if isinstance(v, int) else f"{v:.4f}" for v in values]
                    writer.writerow([name, kind, *shown])
        return [markdown, path]


def make_table(number: int, request: Request, scale: Scale, store: Store) -> ReproducedTable:
    """The table of the finished cells; the others' places stay empty."""
    return _feature_table(request, scale, store) if number == FEATURE_TABLE else _table(number, request, scale, store)


def _table(number: int, request: Request, scale: Scale, store: Store) -> ReproducedTable:
    panels = table_panels(number, request)
    defenses = [d for d in DEFENSES if request.defenses is None or d in request.defenses]
    columns = {f"{d}/{m}": f"{DEFENSE_NAMES[d]} {m.upper()}" for d in defenses for m in METRICS}
    entries = {
        (panel.attack, defense, seed): store.read(Cell(subject_of(panel, scale, seed), defense))
        for panel in panels
        for defense in defenses
        for seed in request.seeds
    }
    ours, paper = {}, {}
    for panel in panels:
        for defense in defenses:
            found = [entry for seed in request.seeds if (entry := entries[panel.attack, defense, seed])]
            for metric in METRICS:
                key = panel.attack, f"{defense}/{metric}"
                ours[key] = Summary(tuple(100 * entry["metrics"][metric] for entry in found))
                paper[key] = paper_value(number, panel.attack, defense, metric)
    notes = _notes(number, scale, [entry for entry in entries.values() if entry], len(entries), request)
    if panels:
        benign = [store.read(Cell(subject_of(panels[0], scale, seed).benign(), "before")) for seed in request.seeds]
        accs = Summary(tuple(100 * entry["metrics"]["acc"] for entry in benign if entry))
        notes.append(f"ACC of the model that was never attacked: {accs.spell(len(request.seeds))}.")
    notes += _der_notes(number, [panel.attack for panel in panels], defenses, ours)
    return ReproducedTable(
        number,
        f"ACC and ASR in %: {TABLES[number].title}{_in_place(scale)}",
        {panel.attack: ATTACK_NAMES[panel.attack] for panel in panels},
        columns,
        ours,
        paper,
        len(request.seeds),
        notes,
    )


def _feature_table(request: Request, scale: Scale, store: Store) -> ReproducedTable:
    panels = table_panels(FEATURE_TABLE, request)
    rows = {"clean": "D clean", "benign": "D benign", "infected": "D infected"}
    entries = {
        (panel.attack, seed): store.read(Cell(subject_of(panel, scale, seed), "features"))
        for panel in panels
        for seed in request.seeds
    }
    ours, paper = {}, {}
    for panel in panels:
        for row in rows:
            found = [entry for seed in request.seeds if (entry := entries[panel.attack, seed])]
            ours[row, panel.attack] = Summary(tuple(entry["metrics"][f"d_{row}"] for entry in found))
            paper[row, panel.attack] = paper_distance(panel.attack, row)
    notes = _notes(FEATURE_TABLE, scale, [entry for entry in entries.values() if entry], len(entries), request)
    notes += [
        "Mean l2 distance to the triggered image x^t, in the features of the infected model: of the clean image (not "
        "in the paper), of the benign model's adversarial image, of the infected model's. Distances depend on the "
        "network's scale: what can be compared is their order.",
        "The text of the paper that this was transcribed from does not have BadNets' figures.",
    ]
    columns = {panel.attack: ATTACK_NAMES[panel.attack] for panel in panels}
    title = f"Feature distances: {TABLES[1].title}{_in_place(scale)}"
    return ReproducedTable(FEATURE_TABLE, title, rows, columns, ours, paper, len(request.seeds), notes)


def _in_place(scale: Scale) -> str:
    return f" ({scale.stand_in} in its place)" if scale.stand_in else ""


def stale_note(entries: Sequence[Mapping[str, Any]], scale: Scale) -> list[str]:
    """One note where cells were made with other options than the scale has now, which names them; else none."""
    stale: dict[str, dict[str, None]] = {}
    for entry in entries:
        subject, task = entry["cell"], entry["cell"]["task"]
        present = _as_json(scale.describe(subject["data"], subject["attack"], subject["setting"], task))
        if of_task(entry["config"], task) != of_task(present, task):
            attack = ATTACK_NAMES.get(subject["attack"], subject["attack"])
            stale.setdefault(DEFENSE_NAMES.get(task, task), {})[attack] = None
    named = "; ".join(f"{task} ({', '.join(attacks)})" for task, attacks in stale.items())
    return [f"Made with other options than the present ones of this scale: {named}."] if stale else []


def _longer_notes(entries: Sequence[Mapping[str, Any]], scale: Scale) -> list[str]:
    """A note for every number of epochs that is not the scale's, with the attacks that have it."""
    others: dict[int, dict[str, None]] = {}
    for entry in entries:
        subject, epochs = entry["cell"], int(entry["config"]["plan"]["epochs"])
        if epochs != scale.plans[subject["data"]].epochs:
            others.setdefault(epochs, {})[ATTACK_NAMES.get(subject["attack"], subject["attack"])] = None
    return [f"Trained for {epochs} epochs: {', '.join(attacks)}." for epochs, attacks in sorted(others.items())]


def _notes(number: int, scale: Scale, entries: Sequence[Mapping[str, Any]], wanted: int, request: Request) -> list[str]:
    """What holds of every table: the scale, what is missing, where the figures come from."""
    seeds = f"Seed{'s' * (len(request.seeds) > 1)} {', '.join(map(str, request.seeds))}"
    spread = "a direction, not a mean" if len(request.seeds) == 1 else "mean ± standard deviation over them"
    notes = [
        f"Scale {scale.name}: {scale.note}",
        f"{len(entries)} of {wanted} cells are finished; {MISSING}: no figure. {seeds}: {spread}.",
    ]
    if images := sorted(
        {
            f"{e['data']['name']} ({e['data']['classes']} classes, {e['data']['train']:,} training and "
            f"{e['data']['clean']:,} clean images)"
            for e in entries
        }
    ):
        notes.append(f"Images: {'; '.join(images)}.")
    notes += _longer_notes(entries, scale) + stale_note(entries, scale)
    if number == 3 and scale.stand_in is None and not all(e["infection"]["weights"] for e in entries):
        notes.append(
            "No ImageNet weights were given (--weights): these networks were trained from scratch, the paper's were "
            "not, and its accuracies cannot be had."
        )
    if commits := sorted({str(e["commit"])[:12] for e in entries if e["commit"]}):
        notes.append(f"Commits: {', '.join(commits)}.")
    return notes


def _der_notes(
    number: int, attacks: Sequence[str], defenses: Sequence[str], ours: Mapping[tuple[str, str], Summary]
) -> list[str]:
    """The mean defence effectiveness rating of each column, over the attacks of which it can be told."""
    if "before" not in defenses or len(defenses) < 2 or not attacks:
        return []
    parts = []
    for defense in defenses[1:]:
        mine, theirs = [], []
        for attack in attacks:
            means = [ours[attack, f"{d}/{m}"].mean for d in ("before", defense) for m in METRICS]
            if None not in means:
                mine.append(defense_rating(*(float(value or 0) for value in means)))
            figures = [paper_value(number, attack, d, m) for d in ("before", defense) for m in METRICS]
            if None not in figures:
                theirs.append(defense_rating(*(float(value or 0) for value in figures)))
        shown = f"{statistics.fmean(mine):.1f}" if mine else MISSING
        count = f" of {len(mine)} attacks" if 0 < len(mine) < len(attacks) else ""
        parts.append(f"{DEFENSE_NAMES[defense]} {shown}{count} (paper {statistics.fmean(theirs):.1f})")
    return [f"Mean DER in %: {', '.join(parts)}."]


def defense_rating(acc_before: float, asr_before: float, acc: float, asr: float) -> float:
    """DER: (max(0, fall of ASR) - max(0, fall of ACC) + 100) / 2, all in percent."""
    return (max(0.0, asr_before - asr) - max(0.0, acc_before - acc) + 100) / 2


def _as_json(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
