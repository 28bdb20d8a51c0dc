"""The picture of a run."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from matplotlib import image as image_files
from pixels import share

from pbe_fast.errors import InputError, OutputError
from pbe_fast.report import draw_figure

MODELS = {"infected": {"acc": 0.9, "asr": 1.0}, "purified": {"acc": 0.88, "asr": 0.01}}
GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.arange(200) < 20
SCORES = torch.where(MASK, 0.2, 0.95) + 0.05 * torch.rand(200, generator=GENERATOR)
PICTURES = {
    "clean": torch.rand(6, 3, 16, 16, generator=GENERATOR),
    "suspected": torch.randint(0, 256, (12, 3, 16, 16), generator=GENERATOR, dtype=torch.uint8),
}


def draw(path, **changes):
    arguments = {"models": MODELS, "scores": SCORES, "poison_mask": MASK, "images": PICTURES, **changes}
    draw_figure(path, **arguments)
    return image_files.imread(path)


def test_a_whole_figure(tmp_path):
    pixels = draw(tmp_path / "figure.png", captions={"suspected": ["cat"] * 12})
    assert pixels.shape[:2] == (640, 1920)
    # Four bars, two of them full, in the two colours; on white.
    assert share(pixels, "#0072B2") > 0.02
    assert 0.01 < share(pixels, "#D55E00") < share(pixels, "#0072B2")
    assert share(pixels, "#ffffff") > 0.4
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_the_bars_are_as_long_as_the_figures(tmp_path):
    erased = draw(tmp_path / "a.png")
    infected = draw(tmp_path / "b.png", models={**MODELS, "purified": {"acc": 0.88, "asr": 1.0}})
    unknown = draw(tmp_path / "c.png", models={k: {"acc": v["acc"], "asr": None} for k, v in MODELS.items()})
    assert share(infected, "#D55E00") == pytest.approx(2 * share(erased, "#D55E00"), rel=0.15)
    assert share(unknown, "#D55E00") < 0.2 * share(erased, "#D55E00")


def test_the_same_results_give_the_same_bytes_whatever_the_users_settings(tmp_path):
    draw(tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "pink", "savefig.dpi": 20}):
        draw(tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"poison_mask": None},
        {"poison_mask": torch.zeros(200, dtype=torch.bool)},
        {"poison_mask": torch.ones(200, dtype=torch.bool)},
        {"scores": torch.full((200,), 1.0)},
        {"scores": torch.where(MASK, torch.nan, SCORES)},
        {"images": {}},
        {"images": {"clean": torch.rand(3, 1, 8, 8)}},
        {"images": {"clean": torch.rand(3, 3, 70, 90)}, "captions": {"clean": ["a very long name of a class"] * 3}},
        {"models": {f"model {i}": {"acc": 1.0, "asr": 0.0} for i in range(7)}},
    ],
    ids=["no truth", "no poison", "all poison", "equal scores", "some NaN", "no pictures", "grey", "large", "seven"],
)
def test_what_a_run_may_lack(tmp_path, changes):
    assert draw(tmp_path / "figure.png", **changes).shape[:2] == (640, 1920)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "models of a figure; got none"),
        ({"scores": torch.full((200,), torch.nan)}, "none that is finite"),
        ({"poison_mask": MASK[:10]}, r"got \(200,\) and \(10,\)"),
        ({"images": {"clean": torch.rand(3, 8, 8)}}, "pictures 'clean'"),
        ({"captions": {"clean": ["one"]}}, "captions of 'clean'; got 1; accepted: one for each of 6"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        draw(tmp_path / "figure.png", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        draw(tmp_path / "file" / "figure.png")
