from __future__ import annotations

import platform
import resource

import pytest
import torch

from pbe_fast.engine.allocator import kept_heap


def _faults(megabytes: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing to tune without glibc")
def test_freed_pages_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with kept_heap() as kept:
        assert kept
        _faults(40)
        inside = _faults(40)
    # 40 MiB are 10,240 pages of 4 KiB, or 20 huge ones; above the largest threshold glibc gives them back every time.
    assert inside < 20
    assert _faults(40) > 10 * max(1, inside)


def test_what_the_environment_tunes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=0")
    with kept_heap() as kept:
        assert not kept


def test_blocks_may_be_nested_and_end_with_an_error() -> None:
    with kept_heap() as outer:
        with pytest.raises(ZeroDivisionError), kept_heap() as inner:
            assert inner == outer
            raise ZeroDivisionError
        torch.ones(1 << 20)
    torch.ones(1 << 20)
