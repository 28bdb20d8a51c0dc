"""The global random state, put aside while a run draws from its own seed."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pbe_fast.errors import InputError

_LIMIT = 2**63


def check_seed(seed: object) -> int:
    """The seed as an int.

    Raises:
        InputError: Anything but a whole number of 64 bits, which is what torch takes; it would say so in the middle of
            a run.
    """
    try:
        number = _LIMIT if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = _LIMIT
    if not -_LIMIT <= number < _LIMIT:
        raise InputError("seed", got=repr(seed), accepted="a whole number from -2^63 to 2^63 - 1")
    return number


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU that draws otherwise than those of other purposes with the same seed.

    Whoever poisons with seed 0 and purifies with seed 0 would otherwise draw the same permutation twice: the random
    sample of a thousand images would be the thousand that were poisoned.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % _LIMIT)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what draws from torch's global generators (dropout does) depends on ``seed`` alone.

    Args:
        seed: Of the global generators of the CPU and of ``device``.
        device: Where the run computes.

    Afterwards, also after an error, the global generators go on as if nothing had been drawn. They are the process's:
    of runs in several threads at a time, each draws from what another has seeded, and what is put back is not certain.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed: that would seed the GPUs which are not put aside, too.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
