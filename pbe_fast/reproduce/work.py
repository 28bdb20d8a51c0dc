"""Going through the matrix: what is finished stays, what somebody else has claimed is left to them."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pbe_fast.engine import interrupts
from pbe_fast.engine.machine import usable_cores
from pbe_fast.engine.progress import progress
from pbe_fast.errors import PBEError
from pbe_fast.finetune import DivergedError
from pbe_fast.reproduce.cells import Cell, Subject
from pbe_fast.reproduce.measure import measure_cell
from pbe_fast.reproduce.scales import Scale
from pbe_fast.reproduce.store import Store, claim
from pbe_fast.reproduce.workshop import Workshop

_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where and how cells are made; it can be sent to another process.

    Args:
        scale: Of the cells.
        root: Folder of that scale.
        data: Folder of the image sets.
        weights: Of an ImageNet checkpoint.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32" or "bf16".
        threads: For torch; None leaves them.
    """

    scale: Scale
    root: Path
    data: Path | None = None
    weights: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None


def make_cells(
    cells: Sequence[Cell],
    job: Job,
    *,
    jobs: int = 1,
    show_progress: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Make the cells that are not there yet, in this process or in several.

    Args:
        cells: In the order in which they are to be made.
        job: Where and how.
        jobs: Processes, each with its share of the threads; all of them use the one device.
        show_progress: Whether there is a bar.
        note: Told of cells that failed.

    Returns:
        Why cells failed, by their names. A failure ends nothing but its cell; the next run tries it again.
    """
    store = Store(job.root)
    finished = sum(store.done(cell) for cell in cells)
    bar = progress(range(len(cells)), total=len(cells), desc="cells", enabled=show_progress)
    failed: dict[str, str] = {}
    with bar:
        bar.update(finished)
        if finished == len(cells):
            return failed
        if jobs == 1:
            watch = _Watch(bar, cells, store, jobs)
            return _work(cells, job, tick=watch.tick, note=note)
        shared = Job(**{**vars(job), "threads": job.threads or max(1, usable_cores() // jobs)})
        watch = _Watch(bar, cells, store, jobs)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
            running = {pool.submit(_work, list(cells), shared) for _ in range(jobs)}
            try:
                while running:
                    done, running = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        failed |= future.result()
                    watch.tick()
            except KeyboardInterrupt:
                _pass_on()
                raise
    # What one process could not do, another may have.
    failed = {cell.name: failed[cell.name] for cell in cells if cell.name in failed and not store.done(cell)}
    for name, why in failed.items():
        note(f"failed: {name}: {why}")
    return failed


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on with all of the cells, and nobody would know."""
    parent = parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_its_end, daemon=True).start()


def _pass_on() -> None:
    """A Ctrl-C reaches the workers as well, a SIGTERM this process alone, which would wait for all of their cells."""
    for worker in active_children():
        if worker.pid is not None and interrupts.pressed(signal.SIGTERM):
            os.kill(worker.pid, signal.SIGINT)


def _work(
    cells: Sequence[Cell],
    job: Job,
    *,
    tick: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Make cells until all are there or have failed; waits for those that others are making."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    store = Store(job.root)
    workshop = Workshop(
        job.scale, store, data=job.data, weights=job.weights, device=job.device, precision=job.precision
    )
    failed: dict[str, str] = {}
    broken: dict[Subject, str] = {}
    while left := [cell for cell in cells if cell.name not in failed and not store.done(cell)]:
        moved = False
        for cell in left:
            try:
                why = next((broken[subject] for subject in cell.subjects() if subject in broken), None)
                if why is not None:
                    failed[cell.name] = why
                    moved = True
                    continue
                moved |= _make(cell, store, workshop, broken)
            except (PBEError, DivergedError) as error:
                failed[cell.name] = " ".join(str(error).split())
                note(f"failed: {cell.name}: {failed[cell.name]}")
                moved = True
            tick()
        if not moved:
            time.sleep(_POLL_S)
    return failed


def _make(cell: Cell, store: Store, workshop: Workshop, broken: dict[Subject, str]) -> bool:
    """Make one cell and the models that it takes; False where somebody else is at it."""
    with claim(store.path(cell)) as mine:
        if not mine:
            return False
        # Somebody may have finished it since it was looked for.
        if store.done(cell):
            return True
        for subject in cell.subjects():
            if not workshop.has(subject) and not _make_model(subject, store, workshop, broken):
                return False
        store.write(cell, measure_cell(cell, workshop))
    return True


def _make_model(subject: Subject, store: Store, workshop: Workshop, broken: dict[Subject, str]) -> bool:
    with claim(store.model_folder(subject)) as mine:
        if mine and not workshop.has(subject):
            try:
                workshop.make(subject)
            except (PBEError, DivergedError) as error:
                broken[subject] = " ".join(str(error).split())
                raise
        return mine


class _Watch:
    """Moves the bar, and says how long it will take: by what cells of a kind have taken, trained models included."""

    def __init__(self, bar: tqdm[Any], cells: Sequence[Cell], store: Store, jobs: int) -> None:
        self._bar = bar
        self._cells = cells
        self._store = store
        self._jobs = jobs
        self._seconds: dict[str, list[float]] = {}
        self._seen: set[Cell] = set()
        self.tick()

    def tick(self) -> None:
        """Look at what is finished."""
        for cell in self._cells:
            if cell not in self._seen and (entry := self._store.read(cell)) is not None:
                self._seen.add(cell)
                self._seconds.setdefault(cell.task, []).append(float(entry["seconds"]))
                if cell.task == "before":
                    training = float(entry["infection"]["seconds"] or 0)
                    self._seconds.setdefault("training", []).append(training)
        self._bar.update(len(self._seen) - self._bar.n)
        self._bar.set_postfix_str(f"about {spell_seconds(self.remaining())} left" if self._seen else "")

    def remaining(self) -> float:
        """Seconds until the last cell is finished, as far as can be told from the finished ones."""
        typical = {task: statistics.median(seconds) for task, seconds in self._seconds.items()}
        unknown = statistics.fmean(typical.values()) if typical else 0.0
        left = [cell for cell in self._cells if cell not in self._seen]
        models = {s for cell in left for s in cell.subjects() if not (self._store.model_folder(s)).is_dir()}
        total = sum(typical.get(cell.task, unknown) for cell in left) + len(models) * typical.get("training", unknown)
        return total / self._jobs


def spell_seconds(seconds: float) -> str:
    """As one would say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
