"""Cells are made once: over interruptions, failures, and several workers."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pbe_fast.errors import InputError
from pbe_fast.reproduce import Cell, Job, Request, Scale, Store, Subject, cells_of, make_cells, work
from pbe_fast.reproduce.measure import precision_by_recall
from pbe_fast.reproduce.store import STALE_S, claim
from pbe_fast.reproduce.workshop import Workshop, load_backbone, read_images

REQUEST = Request(tables=(1,), attacks=("badnets",), defenses=("before", "ft", "pbe_no_clean"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_POLL_S", 0.01)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, made_up: Callable) -> list[str]:
    """Cells and models cost nothing; the list tells what was made."""
    made: list[str] = []

    def make(self: Workshop, subject: Subject) -> None:
        made.append(subject.name)
        folder = self._store.model_folder(subject)
        folder.mkdir(parents=True)
        (folder / "infection.json").write_text("{}")

    def measure(cell: Cell, workshop: Workshop) -> dict[str, Any]:
        made.append(cell.name)
        return dict(made_up(cell, workshop.scale, acc=0.5, asr=0.5))

    monkeypatch.setattr(Workshop, "make", make)
    monkeypatch.setattr(work, "measure_cell", measure)
    return made


def test_a_killed_run_goes_on_where_it_was(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, store, job = cells_of(REQUEST, tiny), Store(tmp_path), Job(scale=tiny, root=tmp_path, device="cpu")
    assert [cell.task for cell in cells] == ["before", "ft", "pbe_no_clean", "before"]
    trained: list[str] = []
    make, measure = Workshop.make, work.measure_cell
    monkeypatch.setattr(Workshop, "make", lambda self, s: (trained.append(s.name), make(self, s))[1])
    measured: list[str] = []

    def kill_at_the_third(cell: Cell, workshop: Workshop) -> dict[str, Any]:
        measured.append(cell.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(cell, workshop)

    monkeypatch.setattr(work, "measure_cell", kill_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_cells(cells, job, show_progress=False)
    assert [store.done(cell) for cell in cells] == [True, True, False, False]
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*.tmp*"))
    before = store.path(cells[0]).stat().st_mtime_ns

    assert make_cells(cells, job, show_progress=False) == {}
    assert measured[3:] == [cells[2].name, cells[3].name]
    assert trained == [cells[0].subject.name, cells[3].subject.name]
    assert store.path(cells[0]).stat().st_mtime_ns == before
    make_cells(cells, job, show_progress=False)
    assert len(measured) == 5

    entry = store.read(cells[2])
    assert entry is not None
    assert entry["cell"] == {
        "data": "digits", "attack": "badnets", "setting": "all_to_one", "target": 3, "seed": 0, "task": "pbe_no_clean",
    }  # fmt: skip
    assert {"versions", "machine", "commit", "date", "seconds", "config"} <= entry.keys()
    assert [r["round"] for r in entry["progress"]] == [0, 1]
    # What was seen after the last round is what was handed back.
    assert all(entry["progress"][-1][name] == entry["metrics"][name] for name in ("acc", "asr", "ap_of_poisoned"))
    assert entry["progress"][0]["poisoned_share"] == pytest.approx(0.1)
    assert entry["data"]["train"] == 200 and entry["data"]["clean"] == 20
    assert store.read(cells[3])["metrics"]["asr"] is None  # type: ignore[index]
    _opens_as_it_was_made(tiny, store, cells[0].subject)


def _opens_as_it_was_made(tiny: Scale, store: Store, subject: Subject) -> None:
    prepared = Workshop(tiny, store, device="cpu").open(subject)
    train, mask = prepared.train, prepared.train.poison_mask
    assert mask is not None and train.true_labels is not None and prepared.triggered is not None
    assert int(mask.sum()) == 20
    assert (train.labels[mask] == 3).all() and (train.true_labels[mask] != 3).all()
    # BadNets' patch: white, in the corner.
    assert (train.images[mask][:, :, -1, -1] == 255).all() and (train.images[~mask][:, :, -1, -1] < 255).any()
    assert (prepared.triggered.images[:, :, -1, -1] == 255).all()


def test_the_evidence_of_the_figures(tiny: Scale, tmp_path: Path) -> None:
    request = Request(figures=(1, 3, 5), attacks=("wanet",), targets=(2,))
    cells, store = cells_of(request, tiny), Store(tmp_path)
    assert make_cells(cells, Job(scale=tiny, root=tmp_path, device="cpu"), show_progress=False) == {}
    found = {cell.name: store.read(cell) for cell in cells}
    reached = found["digits-wanet-all_to_one-target2-s0-reached"]["levels"][0]["counts"]
    assert torch.tensor(reached).sum() == 40
    features = found["digits-wanet-all_to_one-target3-s0-features"]
    assert all(features["metrics"][f"d_{kind}"] > 0 for kind in ("clean", "benign", "infected"))
    assert len(features["maps"]) == 2 and set(features["maps"][0]["pictures"]) == {
        "clean", "benign", "infected", "triggered",
    }  # fmt: skip
    points = found["digits-wanet-all_to_one-target3-s0-tsne"]["points"]
    # The class of the target is there, but none of its images has a trigger on it.
    labels = {kind: [own for found, own, *_ in points if found == kind] for kind in ("clean", "infected", "triggered")}
    assert labels["clean"] == labels["infected"] and len(labels["clean"]) == 40 and 3 in labels["clean"]
    assert labels["triggered"] == [label for label in labels["clean"] if label != 3]


def test_a_failure_ends_its_cell_alone(tiny: Scale, tmp_path: Path, stubbed: list, monkeypatch: Any) -> None:
    cells, store = cells_of(REQUEST, tiny), Store(tmp_path)
    measure = work.measure_cell

    def fail(cell: Cell, workshop: Workshop) -> dict[str, Any]:
        if cell.task == "ft":
            raise InputError("clean set", got="too small")
        return measure(cell, workshop)

    monkeypatch.setattr(work, "measure_cell", fail)
    notes: list[str] = []
    failed = make_cells(cells, Job(scale=tiny, root=tmp_path), show_progress=False, note=notes.append)
    assert failed == {cells[1].name: "clean set; got too small"}
    assert notes == [f"failed: {cells[1].name}: clean set; got too small"]
    assert [store.done(cell) for cell in cells] == [True, False, True, True]


def test_a_model_that_cannot_be_trained_fails_its_cells_once(
    tiny: Scale, tmp_path: Path, stubbed: list, monkeypatch: Any
) -> None:
    cells, tried = cells_of(REQUEST, tiny), []
    make = Workshop.make

    def fail(self: Workshop, subject: Subject) -> None:
        tried.append(subject.name)
        if subject.attack == "badnets":
            raise InputError("poison_rate")
        make(self, subject)

    monkeypatch.setattr(Workshop, "make", fail)
    failed = make_cells(cells, Job(scale=tiny, root=tmp_path), show_progress=False)
    assert failed == dict.fromkeys([cell.name for cell in cells[:3]], "poison_rate")
    assert len(tried) == 2 and Store(tmp_path).done(cells[3])


def test_workers_side_by_side_make_every_cell_and_model_once(tiny: Scale, tmp_path: Path, stubbed: list) -> None:
    cells = cells_of(Request(tables=(1,), seeds=(0, 1)), tiny)
    job = Job(scale=tiny, root=tmp_path)
    threads = [threading.Thread(target=work._work, args=(cells, job)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stubbed) == sorted([c.name for c in cells] + list({c.subject.name for c in cells}))


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Runs a function in another process, until it is told to end."""
    context = multiprocessing.get_context("fork")
    started: list[Any] = []

    def start(target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def _hold(pipe: Any, path: Path) -> None:
    with claim(path) as mine:
        pipe.send(mine)
        pipe.recv()
    pipe.send("released")


def test_two_processes_do_not_claim_the_same(tmp_path: Path, elsewhere: Callable[..., Any]) -> None:
    path = tmp_path / "cell.json"
    _, pipe = elsewhere(_hold, path)
    assert pipe.recv() is True
    with claim(path) as mine:
        assert not mine
    with claim(tmp_path / "other.json") as mine:
        assert mine
    pipe.send("go on")
    assert pipe.recv() == "released"
    with claim(path) as mine:
        assert mine


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path, elsewhere: Callable[..., Any]) -> None:
    path = tmp_path / "cell.json"
    process, pipe = elsewhere(_hold, path)
    assert pipe.recv() is True
    process.kill()
    process.join()
    assert (tmp_path / "cell.json.lock").exists()
    with claim(path) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_another_machine_goes_stale_by_its_age(tmp_path: Path) -> None:
    lock = tmp_path / "cell.json.lock"
    lock.write_text('{"host": "elsewhere/0", "pid": 1}')
    with claim(tmp_path / "cell.json") as mine:
        assert not mine
    long_ago = lock.stat().st_mtime - 2 * STALE_S
    os.utime(lock, (long_ago, long_ago))
    with claim(tmp_path / "cell.json") as mine:
        assert mine


def test_a_file_that_is_no_cell(tiny: Scale, tmp_path: Path) -> None:
    cell, store = cells_of(REQUEST, tiny)[0], Store(tmp_path)
    store.path(cell).parent.mkdir()
    for text in ("{", "[]", "{}"):
        store.path(cell).write_text(text)
        with pytest.raises(InputError, match="accepted: JSON as reproduce writes it"):
            store.read(cell)


def test_the_estimate_counts_cells_of_a_kind_and_models(tiny: Scale, tmp_path: Path, made_up: Callable) -> None:
    cells, store = cells_of(REQUEST, tiny), Store(tmp_path)
    entry = made_up(cells[0], tiny, acc=1.0, asr=1.0)
    store.write(cells[0], {**entry, "seconds": 4.0, "infection": {"seconds": 100.0, "weights": None}})
    store.model_folder(cells[0].subject).mkdir(parents=True)
    bar = work.progress(range(4), total=4, enabled=False)
    # ft and pbe_no_clean are not known yet and count as the mean of what is; then the benign model, and measuring it.
    assert work._Watch(bar, cells, store, 1).remaining() == pytest.approx(2 * 52 + 100 + 4)
    assert work._Watch(bar, cells, store, 4).remaining() == pytest.approx((2 * 52 + 100 + 4) / 4)
    assert [work.spell_seconds(s) for s in (40, 600, 12_600)] == ["40 s", "10 min", "3.5 h"]


def test_precision_by_recall() -> None:
    positives = torch.tensor([True, False, True, False, False, True, True, False])
    order = torch.arange(8)
    # Recalls of 1/4, 2/4, 3/4, 4/4 are reached at places 1, 3, 6 and 7.
    assert precision_by_recall(order, positives, 5) == pytest.approx([1, 1, 2 / 3, 3 / 6, 4 / 7], abs=1e-4)
    thirty = torch.arange(100) < 30
    assert precision_by_recall(torch.arange(100), thirty)[-1] == 1.0
    assert precision_by_recall(torch.arange(100).flip(0), thirty)[-1] == pytest.approx(0.3)


def test_weights_of_another_head_fit_and_of_another_network_do_not() -> None:
    net = torch.nn.Sequential()
    net.add_module("conv", torch.nn.Conv2d(1, 2, 3))
    net.add_module("fc", torch.nn.Linear(2, 3))
    given = {"conv.weight": torch.ones(2, 1, 3, 3), "conv.bias": torch.ones(2), "fc.weight": torch.ones(1000, 2)}
    head = net.get_submodule("fc").weight.clone()
    load_backbone(net, given, "w.pt")
    assert (net.get_submodule("conv").weight == 1).all() and (net.get_submodule("fc").weight == head).all()
    with pytest.raises(InputError, match=r"--weights w.pt; got 1 of 4 tensors.*conv.bias"):
        load_backbone(net, {"conv.weight": given["conv.weight"]}, "w.pt")


def test_images_that_are_not_there(tmp_path: Path) -> None:
    for name, folder, message in (
        ("cifar10", None, "--data ROOT"),
        ("gtsrb", tmp_path, "gtsrb-train.parquet, or torchvision"),
        ("tiny-imagenet", tmp_path, "tiny-imagenet20-train.parquet"),
    ):
        with pytest.raises(InputError, match=message):
            read_images(name, "train", folder)
