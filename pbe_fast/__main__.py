"""``python -m pbe_fast``: the command line."""

from __future__ import annotations

from pbe_fast.cli.__main__ import start

if __name__ == "__main__":
    start()
