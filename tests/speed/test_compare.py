"""bench/compare.py, bench/results.py and bench/report.py on made-up results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.fixture(autouse=True)
def beside_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in ("compare", "results", "report"):
        sys.modules.pop(name, None)


def measured(*ratios: float) -> Callable[[], float]:
    return iter(ratios).__next__


def test_a_ratio_is_lost_only_at_the_second_attempt() -> None:
    from compare import lost

    recorded = {"as before": 3.0, "a busy moment": 3.0, "slower": 3.0, "just within": 3.0}
    measure = {
        "as before": measured(3.1),
        "a busy moment": measured(2.0, 2.9),
        "slower": measured(2.5, 2.5),
        "just within": measured(2.56),
        "new": measured(),
    }
    assert lost(recorded, measure) == ["slower"]


def test_kinds_of_machines() -> None:
    from results import kind_of

    cpu = {"processor": "X 9000", "torch_threads": 2, "gpu": None}
    assert kind_of(cpu) == kind_of(dict(cpu)) != kind_of({**cpu, "torch_threads": 4})
    assert kind_of(cpu) != kind_of({**cpu, "processor": "X 9001"})
    assert kind_of({**cpu, "gpu": "H200"}) == kind_of(cpu)
    assert kind_of({**cpu, "gpu": "H200"}, gpu=True) == "H200"


def described(date: str) -> dict[str, Any]:
    return {
        "versions": {"torch": "2.13.0", "python": "3.11.2"},
        "machine": {"processor": "X", "torch_threads": 2, "gpu": None, "cores": 2},
        "commit": "0123456789abcdef",
        "date": f"{date}T00:00:00+00:00",
    }


def field(rate: float) -> dict[str, Any]:
    def run(rate: float) -> dict[str, Any]:
        seconds = 1 / rate
        return {
            "seconds": seconds,
            "iqr_seconds": 0.0,
            "rate": rate,
            "share_of_peak": rate / 1e3,
            "dtype": "float32",
        }

    return {
        "name": "test_pgd[cpu-preact-16]",
        "network": "preact-16",
        "images": 64,
        "unit": "image-steps/s",
        "runs": {"ours": run(rate), "peer": run(100.0)},
        "ratios": {"ours / peer": rate / 100},
        "promised": {"ours / peer": 2.5},
        "promised_share": 0.0,
    }


def test_results_of_two_days_become_a_page(tmp_path: Path) -> None:
    from report import write_report
    from results import read_results, write_results

    folder = tmp_path / "results"
    operation = {"name": "test_x", "quick": "x", "ratio": 8.0, "ours_ms": 1.0, "ours_iqr_ms": 0.1, "peer_ms": 8.0}
    for date, rate in (("2026-01-02", 300.0), ("2026-01-01", 200.0)):
        write_results(folder, [field(rate), operation], described=described(date), seed=0, scale="normal")
    write_results(folder, [field(1.0)], described=described("2026-01-03"), seed=0, scale="tiny")
    results = read_results(folder)
    assert [result["date"][:10] for result in results] == ["2026-01-01", "2026-01-02", "2026-01-03"]

    text = write_report(results, tmp_path).read_text()
    # The newest, and not the run that only shows that everything runs.
    assert "2026-01-02" in text and "2026-01-03" not in text and "3.00" in text
    assert "Falls short" not in text
    for name in ("ratios", "share", "history"):
        assert (tmp_path / f"benchmarks-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_later_run_of_the_day_replaces_only_what_it_measured(tmp_path: Path) -> None:
    from results import read_results, write_results

    first, again = described("2026-01-01"), {**described("2026-01-01"), "commit": "later"}
    other = {"name": "test_other", "ratio": 2.0}
    write_results(tmp_path, [field(200.0), other], described=first, seed=0, scale="normal")
    write_results(tmp_path, [field(300.0)], described=again, seed=0, scale="normal")
    (result,) = read_results(tmp_path)
    assert [case["name"] for case in result["cases"]] == [field(200.0)["name"], "test_other"]
    assert [case["commit"] for case in result["cases"]] == ["later", first["commit"]]


def test_a_run_of_one_case_takes_no_other_off_the_page(tmp_path: Path) -> None:
    from report import write_report
    from results import read_results, write_results

    operation = {"name": "test_x", "quick": "x", "ratio": 8.0, "ours_ms": 1.0, "ours_iqr_ms": 0.1, "peer_ms": 8.0}
    folder = tmp_path / "results"
    write_results(folder, [field(300.0), operation], described=described("2026-01-01"), seed=0, scale="normal")
    later = {**described("2026-01-02"), "commit": "fedcba9876543210"}
    write_results(folder, [{**operation, "ratio": 7.5}], described=later, seed=0, scale="normal")
    text = write_report(read_results(folder), tmp_path).read_text()
    assert "2026-01-01, commit 0123456789ab.\n" in text and "3.00" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| x ")]
    assert "7.50" in line and "2026-01-02, commit fedcba987654" in line


@pytest.mark.parametrize(("value", "spelled"), [(1968.2, "1,970"), (158.4, "158"), (0.04121, "0.0412"), (1.0, "1.00")])
def test_throughputs_are_spelled_without_powers_of_ten(value: float, spelled: str) -> None:
    from report import _three_digits

    assert _three_digits(value) == spelled


def test_what_falls_short_is_said(tmp_path: Path) -> None:
    from report import write_report
    from results import read_results, write_results

    write_results(tmp_path / "results", [field(200.0)], described=described("2026-01-01"), seed=0, scale="normal")
    text = write_report(read_results(tmp_path / "results"), tmp_path).read_text()
    assert "Falls short: ours / peer: 2.000, promised 2.5." in text


def test_one_case_that_was_measured_once_is_not_drawn_and_seeds_are_said(tmp_path: Path) -> None:
    from report import write_report
    from results import read_results, write_results

    quality = {"ours": {"acc": 80.0, "asr": 1.0}, "plain": {"acc": 80.5, "asr": 1.5}}
    case = {**field(300.0), "quality": quality, "infected": {"acc": 81.0, "asr": 100.0}, "seeds": [0, 1, 2]}
    write_results(tmp_path / "results", [case], described=described("2026-01-01"), seed=0, scale="full")
    text = write_report(read_results(tmp_path / "results"), tmp_path).read_text()
    assert "full scale" in text and "Means over the seeds 0, 1, 2:" in text
    assert "![" not in text and not list(tmp_path.glob("*.png"))
