"""Compiles the Triton kernels ahead of time, on a machine without a GPU, and reads what the assembler says of them.

``python -m pbe_fast.kernels.aot`` prints registers, spills and shared memory of every kernel with the launch
configurations in use. An operation takes part by having ``aot_cases() -> list[Case]`` in its triton_kernel.py. Run this
without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pbe_fast.kernels.backends import TRITON_OPS

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """One kernel with one launch configuration.

    Args:
        name: What the table calls it: "linf bf16 -> bf16".
        kernel: The function under ``@triton.jit``.
        signature: Types by argument name: "*fp32", "*bf16", "i32", "fp32"; "constexpr" for constants.
        constants: Values of the constexpr arguments.
        divisible: Integer arguments that are multiples of 16 in practice; pointers always are, as torch allocates them.
        num_warps: As in the launch.
        num_stages: As in the launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers per thread, bytes spilled, bytes of shared memory per block."""

    op: str
    case: str
    arch: int
    registers: int
    spills: int
    shared: int


def compile_case(op: str, case: Case, arch: int) -> Usage:
    """Compiles one case for compute capability ``arch`` (80, 90, 100, ...) and asks ptxas what it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    if set(names) != set(case.signature):
        raise ValueError(f"arguments of {case.name}; got {sorted(case.signature)}; accepted: {sorted(names)}")
    # Without the hint that the launcher would derive from the real arguments, loads would not be vectorised.
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*") or name in case.divisible]
    source = ASTSource(
        fn=case.kernel,
        # In the kernel's own order: Triton binds by position.
        signature={name: case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _assemble(compiled.asm["ptx"], arch)
    return Usage(op, case.name, arch, registers, spills, compiled.metadata.shared)


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    import triton.backends.nvidia as nvidia

    # The wheel carries a second, newer ptxas for Blackwell.
    tool = Path(nvidia.__path__[0]) / "bin" / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("PTX without a .target line")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(tool), "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", log))
    return registers, sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def report(ops: tuple[str, ...] = TRITON_OPS, architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Usage]:
    """Compiles every case of the operations, for every architecture."""
    for op in ops:
        for case in importlib.import_module(f"pbe_fast.kernels.{op}.triton_kernel").aot_cases():
            for arch in architectures:
                yield compile_case(op, case, arch)


def main() -> int:
    """Prints the table, or JSON lines; 1 if any kernel spills."""
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the Triton kernels.")
    parser.add_argument("--op", action="append", choices=TRITON_OPS, help="only this operation (may be repeated)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    if not args.json:
        print(f"{'operation':<12} {'kernel':<44} {'sm':>4} {'registers':>9} {'spills':>6} {'shared':>7}")
    spilled = False
    for usage in report(tuple(args.op or TRITON_OPS)):
        spilled |= usage.spills > 0
        if args.json:
            print(json.dumps(asdict(usage)), flush=True)
        else:
            row = f"{usage.registers:>9} {usage.spills:>6} {usage.shared:>7}"
            print(f"{usage.op:<12} {usage.case:<44} {usage.arch:>4} {row}", flush=True)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
