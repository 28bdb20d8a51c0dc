"""The matrix: what there is to infect and to measure, and which table and figure needs what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pbe_fast.errors import InputError
from pbe_fast.reproduce.scales import Scale
from pbe_fast.triggers import TRIGGERS

ATTACKS = tuple(TRIGGERS)
BENIGN = "benign"
# The columns of Tables 1 to 4, left to right.
DEFENSES = ("before", "ft", "fp", "nad", "nc", "anp", "pbe_no_clean", "pbe")


@dataclass(frozen=True)
class Subject:
    """A model to be trained: infected by an attack, or benign."""

    data: str
    attack: str
    setting: str
    target: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        if self.attack == BENIGN:
            return f"{self.data}-{BENIGN}-s{self.seed}"
        aim = f"target{self.target}" if self.setting == "all_to_one" else "all"
        return f"{self.data}-{self.attack}-{self.setting}-{aim}-s{self.seed}"

    def benign(self) -> Subject:
        """The model of the same images and seed without an attack."""
        return Subject(self.data, BENIGN, "", 0, self.seed)


@dataclass(frozen=True)
class Cell:
    """Something measured on a subject, and kept as one JSON file.

    ``task`` is a column of the tables ("before", "ft", ..., "pbe"), "reached" (Fig. 1 and 4), "features" (Table 5 and
    Fig. 3), "tsne" (Fig. 5) or "scan" (the table of what `pbe_fast.scan` finds).
    """

    subject: Subject
    task: str

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"{self.subject.name}-{self.task}"

    def subjects(self) -> tuple[Subject, ...]:
        """The models that it takes."""
        both = self.task in ("features", "tsne") and self.subject.attack != BENIGN
        return (self.subject.benign(), self.subject) if both else (self.subject,)


@dataclass(frozen=True)
class Panel:
    """One data set under one attack and setting, as a part of a figure."""

    data: str
    attack: str
    setting: str


@dataclass(frozen=True)
class TableSpec:
    """One of Tables 1 to 4."""

    title: str
    data: str
    setting: str
    attacks: tuple[str, ...] = ATTACKS


TABLES = {
    1: TableSpec("CIFAR-10, all-to-one", "cifar10", "all_to_one"),
    2: TableSpec("GTSRB, all-to-one", "gtsrb", "all_to_one"),
    3: TableSpec(
        "Tiny-ImageNet, all-to-one", "tiny-imagenet", "all_to_one", tuple(a for a in ATTACKS if a != "input_aware")
    ),
    4: TableSpec("CIFAR-10, all-to-all", "cifar10", "all_to_all"),
}
FEATURE_TABLE = 5
SCANNED_TABLES = (1, 4)
TABLE_NUMBERS = (*TABLES, FEATURE_TABLE)

# The paper's text names Fig. 1's attack and Fig. 6's; it says which attacks, settings and data sets Fig. 4 has, but
# not in which combinations.
MATRICES = {
    1: (Panel("cifar10", "wanet", "all_to_one"),),
    4: (
        Panel("cifar10", "blend", "all_to_one"),
        Panel("cifar10", "sig", "all_to_one"),
        Panel("cifar10", "wanet", "all_to_all"),
        Panel("gtsrb", "blend", "all_to_one"),
    ),
}
SINGLE = Panel("cifar10", "blend", "all_to_one")
# What each of them draws comes first.
SINGLE_TASKS = {3: ("features",), 5: ("tsne",), 6: ("pbe_no_clean",), 7: ("pbe_no_clean", "before")}
# All panels have these labels.
TARGETS = tuple(range(10))
FIGURE_NUMBERS = tuple(sorted({*MATRICES, *SINGLE_TASKS}))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Args:
        tables: Of 1 to 5.
        figures: Of 1, 3, 4, 5, 6, 7.
        scan: Whether the models of Tables 1 and 4, and benign ones, are scanned for a backdoor.
        seeds: Of the models.
        targets: Target labels of Fig. 1 and 4, one model each; None for the scale's.
        attacks: Only these, where the table or figure has several; None for all.
        defenses: Only these columns; None for all.

    Raises:
        InputError: A number or a name that there is not.
    """

    tables: tuple[int, ...] = ()
    figures: tuple[int, ...] = ()
    scan: bool = False
    seeds: tuple[int, ...] = (0,)
    targets: tuple[int, ...] | None = None
    attacks: tuple[str, ...] | None = None
    defenses: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check("table", self.tables, TABLE_NUMBERS)
        _check("figure", self.figures, FIGURE_NUMBERS)
        _check("attack", self.attacks or (), ATTACKS)
        _check("defense", self.defenses or (), DEFENSES)
        # scikit-learn's t-SNE takes seeds of 32 bits.
        known = all(0 <= seed < 2**32 for seed in self.seeds)
        if not self.seeds or not known or len(set(self.seeds)) < len(self.seeds):
            raise InputError("seeds", got=self.seeds, accepted="different numbers from 0 to 2^32 - 1, at least one")

        if self.targets is not None:
            _check("target", self.targets, TARGETS)
            if not self.targets or len(set(self.targets)) < len(self.targets):
                raise InputError("targets", got=self.targets, accepted="different labels, at least one")

    def wants(self, attack: str) -> bool:
        """Whether the attack is among those asked for."""
        return self.attacks is None or attack in self.attacks


def cells_of(request: Request, scale: Scale) -> list[Cell]:
    """All cells of a request, each once: the first seed's first, those of one model together."""
    found: dict[Cell, None] = {}
    for seed in request.seeds:
        for number in request.tables:
            found |= dict.fromkeys(_table_cells(number, request, scale, seed))
        for number in request.figures:
            found |= dict.fromkeys(_figure_cells(number, request, scale, seed))
        if request.scan:
            found |= dict.fromkeys(Cell(subject, "scan") for subject in scan_subjects(request, scale, seed))
    order = {subject: i for i, subject in enumerate(dict.fromkeys(cell.subject for cell in found))}
    return sorted(found, key=lambda cell: order[cell.subject])


def subject_of(panel: Panel, scale: Scale, seed: int, target: int | None = None) -> Subject:
    """The model of a panel at a scale, where other images may stand in for those of the paper."""
    data = scale.stand_in or panel.data
    aimed = scale.plans[data].target if target is None else target
    return Subject(data, panel.attack, panel.setting, aimed if panel.setting == "all_to_one" else 0, seed)


def table_panels(number: int, request: Request) -> list[Panel]:
    """The rows of a table (of Table 5, the columns) that are asked for."""
    table = TABLES.get(number, TABLES[1])
    return [Panel(table.data, attack, table.setting) for attack in table.attacks if request.wants(attack)]


def matrix_subjects(panel: Panel, request: Request, scale: Scale, seed: int) -> list[Subject]:
    """The models of a panel of Fig. 1 or 4, by target label."""
    if panel.setting == "all_to_all":
        return [subject_of(panel, scale, seed)]
    targets = scale.targets if request.targets is None else request.targets
    return [subject_of(panel, scale, seed, target) for target in targets or (None,)]


def scan_subjects(request: Request, scale: Scale, seed: int) -> list[Subject]:
    """The models of Tables 1 and 4, then the benign one of the same images."""
    subjects = [subject_of(panel, scale, seed) for number in SCANNED_TABLES for panel in table_panels(number, request)]
    return [*subjects, *(subject.benign() for subject in subjects[:1])]


def _table_cells(number: int, request: Request, scale: Scale, seed: int) -> list[Cell]:
    subjects = [subject_of(panel, scale, seed) for panel in table_panels(number, request)]
    if number == FEATURE_TABLE:
        return [Cell(subject, "features") for subject in subjects]
    tasks = [task for task in DEFENSES if request.defenses is None or task in request.defenses]
    benign = [Cell(subjects[0].benign(), "before")] if subjects and "before" in tasks else []
    return [*(Cell(subject, task) for subject in subjects for task in tasks), *benign]


def _figure_cells(number: int, request: Request, scale: Scale, seed: int) -> list[Cell]:
    if number in SINGLE_TASKS:
        attack = request.attacks[0] if request.attacks else SINGLE.attack
        panel = dataclasses.replace(SINGLE, attack=attack)
        return [Cell(subject_of(panel, scale, seed), task) for task in SINGLE_TASKS[number]]
    # One model for each target: more seeds of them would not fit in the picture.
    if seed != request.seeds[0]:
        return []
    cells = []
    for panel in MATRICES[number]:
        if request.wants(panel.attack):
            subjects = matrix_subjects(panel, request, scale, seed)
            cells += [Cell(subject, "reached") for subject in (subjects[0].benign(), *subjects)]
    return cells


def _check(what: str, got: Sequence[object], accepted: Sequence[object]) -> None:
    for value in got:
        if value not in accepted:
            raise InputError(what, got=value, accepted=", ".join(map(str, accepted)))
