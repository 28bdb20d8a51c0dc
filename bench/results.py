"""Result files of bench/speed: one JSON per kind of machine and date, and what makes two machines of a kind."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

from pbe_fast.engine.files import write_text

FOLDER = Path(__file__).parent / "results" / "speed"

# The instructions that decide how fast a product of matrices is, and in which format.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def kind_of(machine: dict[str, Any], *, gpu: bool = False) -> str:
    """Machines of one kind are compared: by the processor's name, its vector instructions and the threads in use.

    Args:
        machine: As `pbe_fast.engine.machine.describe` has it.
        gpu: By the GPU's name instead.
    """
    if gpu:
        return str(machine["gpu"])
    flags = "+".join(flag for flag in _FLAGS if flag in _cpu_flags())
    threads = machine["torch_threads"]
    return f"{machine['processor']}, {flags or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def write_results(
    folder: Path, cases: list[dict[str, Any]], *, described: dict[str, Any], seed: int, scale: str
) -> Path:
    """One file with every case of a day: another run replaces the cases that it has, and leaves the others.

    Args:
        folder: Made, if it is missing.
        cases: ``name`` and what a case stored, in plain JSON values.
        described: See `pbe_fast.engine.machine.describe`.
        seed: Of the run.
        scale: See bench/speed/cases.py. Other scales than "normal" have files of their own.
    """
    kind = kind_of(described["machine"], gpu=any(case.get("device", "cpu") != "cpu" for case in cases))
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    suffix = "" if scale == "normal" else f"-{scale}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug}-{described['date'][:10]}{suffix}.json"
    measured = [{**_rounded(case), "commit": described.get("commit")} for case in cases]
    names = {case["name"] for case in measured}
    earlier = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else []
    measured += [case for case in earlier if case["name"] not in names]
    content = {"kind": kind, "scale": scale, "seed": seed, **described, "cases": measured}
    return write_text(path, json.dumps(content, indent=1) + "\n")


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All files in the order of their dates."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: str(result["date"]))


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _rounded(value: Any) -> Any:
    """Five significant digits: more than any of these figures has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
