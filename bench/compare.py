"""Whether a few ratios to plain PyTorch still are what they were: `make bench-compare`, a minute, run by CI.

Seconds depend on the machine and on what else it does; ratios of two functions that alternate in one process hardly do.
They are compared with the last recorded ones of the same kind of machine (bench/results.py). Where a ratio has lost
more than 15 % it is measured again, and only if it is lost again does the comparison fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

LOSS = 0.15


def lost(recorded: Mapping[str, float], measure: Mapping[str, Callable[[], float]]) -> list[str]:
    """Names whose ratio is lost twice; prints a line for each.

    Args:
        recorded: Ratios by name.
        measure: Gives a ratio of today, by name. Names that were not recorded are left out.
    """
    failed = []
    for name, ratio_now in measure.items():
        if name not in recorded:
            print(f"{name:36s} not recorded yet")
            continue
        least = (1 - LOSS) * recorded[name]
        now = ratio_now()
        again = now < least
        if again:
            now = max(now, ratio_now())
        verdict = "lost" if now < least else "ok at the second attempt" if again else "ok"
        print(f"{name:36s} recorded {recorded[name]:6.2f}, now {now:6.2f}  {verdict}", flush=True)
        if now < least:
            failed.append(name)
    return failed


def main() -> int:
    """Exit status: 1 where a ratio is lost."""
    sys.path[:0] = [str(Path(__file__).parent / "speed")]
    from quick import CASES
    from results import kind_of, read_results

    from pbe_fast.engine.machine import describe

    kind = kind_of(describe()["machine"])
    same = [result for result in read_results() if result["kind"] == kind and result["scale"] == "normal"]
    found = {case["quick"]: float(case["ratio"]) for result in same for case in result["cases"] if "quick" in case}
    if not found:
        print(f"nothing to compare with: no ratios were recorded on {kind}")
        return 0
    print(f"ratios on {kind}")
    failed = lost(found, {name: lambda case=case: case().ratio for name, case in CASES.items()})
    if failed:
        print(f"error: more than {LOSS:.0%} lost: {', '.join(failed)}; accepted: what was recorded, or a new record")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
