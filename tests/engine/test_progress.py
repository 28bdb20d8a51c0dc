"""Bars only for what lasts."""

from __future__ import annotations

import time

import pytest

from pbe_fast.engine import progress as module
from pbe_fast.engine.progress import progress


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(module, "DELAY_S", 0.15)
    monkeypatch.setattr(module, "LOG_INTERVAL_S", 0.05)


def work(seconds, **options):
    total = 0
    for item in progress(range(10), desc="ranking", **options):
        time.sleep(seconds / 10)
        total += item
    return total


def test_long_work_shows_on_stderr_only(capsys):
    assert work(0.5) == 45
    out, err = capsys.readouterr()
    assert out == ""
    assert "ranking" in err
    assert "10/10" in err


def test_short_work_shows_nothing(capsys):
    assert work(0.01) == 45
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_nothing(capsys):
    assert work(0.5, enabled=False) == 45
    assert capsys.readouterr() == ("", "")


def test_a_generator_with_a_total_and_a_figure_beside_it(capsys):
    bar = progress((i for i in range(10)), total=10, desc="epochs")
    for i in bar:
        bar.set_postfix(loss=i)
        time.sleep(0.05)
    err = capsys.readouterr().err
    assert "epochs: 100%" in err
    assert "loss=9" in err


def test_a_bar_that_is_told_to_draw_waits_and_ends_its_line(capsys):
    with progress(range(10), desc="cells") as bar:
        bar.set_postfix_str("a minute left")
        assert capsys.readouterr().err == ""
        time.sleep(0.2)
        for _ in range(50):
            bar.set_postfix_str("half a minute left")
    err = capsys.readouterr().err
    assert "half a minute left" in err and err.endswith("\n")
    assert err.count("cells") < 10


def test_a_bar_that_shows_nothing_may_be_told_to_draw(capsys):
    with progress(range(10), desc="cells", enabled=False) as bar:
        bar.set_postfix_str("a minute left")
    assert capsys.readouterr() == ("", "")
