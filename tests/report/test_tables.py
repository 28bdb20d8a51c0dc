"""The table that the demo prints."""

from __future__ import annotations

from pbe_fast.report import metrics_table
from pbe_fast.report.tables import named_models, percent, table

MODELS = {
    "infected": {"acc": 0.99, "asr": 1.0, "asr_with_target": 0.999, "recovered_acc": 0.0},
    "fine_tuned": {"acc": 0.985, "asr": 0.9972, "asr_with_target": 0.9975, "recovered_acc": 0.003},
    "purified": {"acc": 0.9871, "asr": 0.00849, "asr_with_target": 0.1, "recovered_acc": 0.95},
    "purified_no_clean": {"acc": 0.971, "asr": 0.041, "asr_with_target": 0.13, "recovered_acc": None},
}


def test_the_demos_table():
    assert metrics_table(MODELS).splitlines() == [
        "| model             | ACC % | ASR % | ASR with target % | recovered ACC % |",
        "| ----------------- | ----: | ----: | ----------------: | --------------: |",
        "| infected          |  99.0 | 100.0 |              99.9 |             0.0 |",
        "| plain fine-tuning |  98.5 |  99.7 |              99.8 |             0.3 |",
        "| PBE, clean set    |  98.7 |   0.8 |              10.0 |            95.0 |",
        "| PBE, no clean set |  97.1 |   4.1 |              13.0 |               – |",
    ]


def test_without_a_trigger_only_accuracy_is_left():
    text = metrics_table({"infected": {"acc": 0.5, "asr": None}, "purified": {"acc": 0.25}})
    assert text.splitlines() == [
        "| model    | ACC % |",
        "| -------- | ----: |",
        "| infected |  50.0 |",
        "| PBE      |  25.0 |",
    ]


def test_other_names_are_shown_as_they_are():
    assert "| fine pruning |" in metrics_table({"fine_pruning": {"acc": 1.0}})


def test_a_baseline_is_called_by_its_name():
    assert "| NAD      |  98.7 |" in metrics_table(
        named_models({k: MODELS[k] for k in ("infected", "purified")}, "nad")
    )
    assert named_models(MODELS, "pbe") == MODELS


def test_percent():
    assert [percent(v) for v in (0.0, 0.12345, 1.0, None, float("nan"))] == ["0.0", "12.3", "100.0", "–", "–"]


def test_a_cell_cannot_break_the_table():
    lines = table(["a|b", "c"], [["x\ny", "1"]]).splitlines()
    assert lines == ["| a\\|b |   c |", "| ---- | --: |", "| x y  |   1 |"]
