"""The page of a run."""

from __future__ import annotations

import base64
import copy
from html.parser import HTMLParser

import pytest
import torch

from pbe_fast.data import ImageSet
from pbe_fast.errors import InputError
from pbe_fast.ranking import rank_distances
from pbe_fast.report import write_html
from pbe_fast.report.html import FRACTIONS
from pbe_fast.rounds import _found

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
REPORT = {
    "infected": {"acc": 0.99, "asr": 0.998, "asr_with_target": 0.997, "recovered_acc": 0.001},
    "purified": {"acc": 0.987, "asr": 0.0081, "asr_with_target": 0.1, "recovered_acc": None},
    "onnx": {
        "path": "m.onnx",
        "max_abs_diff": 2.5e-6,
        "argmax_agreement": 1.0,
        "acc": 0.987,
        "asr": 0.0081,
        "ok": True,
    },
    "rounds": [
        {"round": 0, "extra_set_size": 50, "ap_of_poisoned": None, "seconds": {"clean": 0.1234567, "ranking": 2.0}},
        {
            "round": 1,
            "extra_set_size": 12000,
            "ap_of_poisoned": 0.9312,
            "extra_set_poison_rate": 0.00042,
            "seconds": {"clean": 1.0},
        },
    ],
    "seconds": {"purify": 12.3456},
    "config": {"pgd": {"eps": 0.0235, "random_start": False}, "fractions": [0.1, 0.2]},
    "seed": 12345,
    "versions": {"torch": "2.13.0+cpu", "triton": None},
    "machine": {"processor": "Some CPU", "cores": 2},
    "sha256": {"inputs": {"model.safetensors": "ab" * 32}, "outputs": {"model.onnx": "cd" * 32}},
}


class Page(HTMLParser):
    """What a reader sees, and every address that a browser would load."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.words, self.addresses, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] not in ("style", "pre"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(tmp_path, report=None, figures=()):
    path = tmp_path / "report.html"
    write_html(path, REPORT if report is None else report, list(figures))
    return Page(path.read_text(encoding="utf-8"))


def test_the_verdict_and_the_tables(tmp_path):
    found = page(tmp_path)
    assert "99.8 → 0.8 % attack success 99.0 → 98.7 % accuracy same ONNX file against the model" in found.text
    models, rounds, *rest = found.tables
    assert models == [
        ["", "ACC", "ASR", "ASR with target", "recovered ACC"],
        ["infected", "99.0", "99.8", "99.7", "0.1"],
        ["PBE", "98.7", "0.8", "10.0", "–"],
    ]
    assert rounds == [
        ["round", "extra set size", "ap of poisoned", "seconds: clean", "seconds: ranking", "extra set poison rate"],
        ["0", "50", "–", "0.1235", "2", "–"],
        ["1", "12,000", "0.9312", "1", "–", "0.042 %"],
    ]
    pairs = dict(row for table in rest for row in table)
    assert pairs["max abs diff"] == "2.5e-06"
    assert pairs["pgd: random start"] == "no"
    assert pairs["fractions"] == "0.1, 0.2"
    assert pairs["seed"] == "12345"
    assert pairs["triton"] == "–"
    assert pairs["seconds: purify"] == "12.35"
    assert pairs["inputs: model.safetensors"] == "ab" * 32
    assert pairs["outputs: model.onnx"] == "cd" * 32


def test_the_report_of_a_round_has_what_the_page_prints_in_percent():
    extra = torch.tensor([0, 1])
    ranking = rank_distances(torch.tensor([0.1, 0.2, 0.3]))
    mask = torch.tensor([False, True, False])
    train = ImageSet(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("a", "b"), poison_mask=mask)
    found = _found(ranking, train, torch.zeros(2, dtype=torch.bool), extra)
    assert {"ap_of_poisoned", "extra_set_poison_rate"} <= found.keys() and "extra_set_poison_rate" in FRACTIONS


def test_rounds_of_several_runs_are_counted_run_by_run(tmp_path):
    rounds = [{"run": "purified", "round": t} for t in range(3)]
    rounds += [{"run": "purified_no_clean", "round": t} for t in range(4)]
    assert "3 and 4 rounds" in page(tmp_path, {**REPORT, "rounds": rounds}).text
    assert "2 rounds" in page(tmp_path).text


def test_another_method_has_its_own_name_steps_and_pictures(tmp_path):
    for name in ("trigger_3.png", "trigger_7.png"):
        (tmp_path / name).write_bytes(PNG)
    report = {**REPORT, "method": "nc", "rounds": [{"step": "unlearning", "finding": "no outlier: nothing done"}]}
    path = tmp_path / "report.html"
    write_html(path, report, thumbnails=[tmp_path / "trigger_3.png", tmp_path / "trigger_7.png"])
    found = Page(path.read_text(encoding="utf-8"))
    assert [row[0] for row in found.tables[0]] == ["", "infected", "Neural Cleanse"]
    assert "Recovered triggers trigger 3 trigger 7 Steps step finding" in found.text
    assert "Rounds" not in found.text and " rounds " not in found.text and "PBE" not in found.text
    assert len(found.addresses) == found.tags.count("figcaption") == 2


def test_nothing_comes_from_outside(tmp_path):
    (tmp_path / "figure.png").write_bytes(PNG)
    found = page(tmp_path, figures=[tmp_path / "figure.png"])
    (address,) = found.addresses
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == PNG
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert all(word not in text for word in ("http://", "https://", "url(", "@import"))
    assert "prefers-color-scheme: dark" in text


def test_every_string_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&'
    report = copy.deepcopy(REPORT)
    report["config"][evil] = evil
    report["onnx"]["path"] = evil
    report["rounds"][0][evil] = evil
    report[evil] = {evil: [evil]}
    report["machine"] = evil
    figure = tmp_path / '"onerror="alert(1)<b>.png'
    figure.write_bytes(PNG)
    found = page(tmp_path, report, [figure])
    assert "script" not in found.tags
    assert found.tags.count("b") == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert 'onerror="' not in text
    cells = [cell for table in found.tables for row in table for cell in row]
    assert evil in cells


def test_a_failed_check_and_a_surviving_backdoor_are_not_dressed_up(tmp_path):
    report = copy.deepcopy(REPORT)
    report["purified"]["asr"] = 0.6
    report["onnx"]["ok"] = False
    found = page(tmp_path, report)
    assert "99.8 → 60.0 % attack success" in found.text
    assert "differs ONNX file against the model" in found.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count('class="card bad"') == 2
    assert 'class="card good"' not in text


def test_the_smallest_report(tmp_path):
    found = page(tmp_path, {"purified": {"acc": 0.5}})
    assert "50.0 % accuracy" in found.text
    assert "attack success" not in found.text
    assert found.tables == [[["", "ACC"], ["PBE", "50.0"]]]


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="accepted: at least one of infected"):
        page(tmp_path, {"rounds": []})
    (tmp_path / "figure.png").write_text("<svg onload=alert(1)>")
    for name in ("figure.png", "absent.png"):
        with pytest.raises(InputError, match=f"{name}.*accepted: a PNG file"):
            page(tmp_path, figures=[tmp_path / name])
    assert not (tmp_path / "report.html").exists()
