from __future__ import annotations

from pbe_fast.cli import main

main(prog_name="pbe-fast")
