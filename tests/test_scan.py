from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pbe_fast
from pbe_fast.calibration import Largest
from pbe_fast.config import ScanConfig
from pbe_fast.data import ImageSet
from pbe_fast.errors import InputError, OutputError, PBEWarning
from pbe_fast.scan import ScanLevel, ScanResult, most_suspicious

K = 6


class Stripes(nn.Module):
    """Answers with the brightest of K stripes; a bright corner leads to ``target``, or from y to y + ``shift``."""

    def __init__(self, *, target: int | None = None, shift: int | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))
        self.target, self.shift = target, shift

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([stripe.mean((1, 2, 3)) for stripe in images[..., 1:].split(2, dim=-1)], dim=1) * self.gain
        corner = F.softplus(100 * (images[:, 0, :2, 0].mean(1, keepdim=True) - 0.42))
        if self.target is not None:
            logits = logits + 2 * corner * F.one_hot(torch.tensor(self.target), K)
        if self.shift is not None:
            logits = logits + 2 * corner * (5 * logits).softmax(1).roll(self.shift, dims=1)
        return logits


def _stripes(n: int = 300) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % K
    images = torch.randint(70, 120, (n, 1, 4, 1 + 2 * K), generator=generator, dtype=torch.uint8)
    images[..., 0] = 90
    for i, k in enumerate(labels.tolist()):
        images[i, :, :, 1 + 2 * k : 3 + 2 * k] += 45
    return ImageSet(images, labels, tuple("abcdef"))


def _scan(model: nn.Module, **options: object) -> ScanResult:
    return pbe_fast.scan(model, _stripes(), config=ScanConfig(**options), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def to_one() -> ScanResult:
    return _scan(Stripes(target=4))


def test_a_benign_model_is_not_suspected() -> None:
    found = _scan(Stripes())
    assert (found.verdict, found.target_label, found.shift, found.found) == ("none", None, None, False)
    assert found.p_value > 0.05 and found.score < 2.5
    assert "no backdoor found" in found.summary()


def test_all_to_one_is_found_with_its_target(to_one: ScanResult) -> None:
    assert (to_one.verdict, to_one.target_label, to_one.shift) == ("all_to_one", 4, None)
    assert to_one.p_value < 1e-4 and to_one.score > 4
    assert int(to_one.level.histogram.argmax()) == 4
    assert "label 4 (e)" in to_one.summary()


@pytest.mark.parametrize("shift", [1, 4])
def test_all_to_all_is_found_with_any_shift(shift: int) -> None:
    found = _scan(Stripes(shift=shift))
    assert (found.verdict, found.target_label, found.shift) == ("all_to_all", None, shift)
    assert f"y -> y + {shift}" in found.summary()
    counts, labels = found.matrix, torch.arange(K)
    arrived = counts[labels, (labels + shift) % K]
    assert (arrived > 0.5 * (counts.sum(1) - counts.diagonal())).all()


def test_the_significance_decides() -> None:
    p_value = _scan(Stripes(target=4)).p_value
    assert 0 < p_value < 0.01
    assert _scan(Stripes(target=4), significance=1.01 * p_value).found
    strict = _scan(Stripes(target=4), significance=0.99 * p_value)
    assert strict.verdict == "none" and strict.target_label is None


class Neighbours(Stripes):
    """Benign, and each stripe is nearest to one other: to a third of them the next one."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        nearest = F.one_hot(torch.tensor([1, 5, 3, 1, 3, 4]), K).float()
        return logits + 2 * (5 * logits).softmax(1) @ nearest


def _only(classes: tuple[int, ...]) -> ImageSet:
    data = _stripes(600)
    return data.select(torch.isin(data.labels, torch.tensor(classes)).nonzero()[:, 0])


@pytest.mark.parametrize("classes", [(2, 3, 4), tuple(range(K))])
def test_few_classes_are_few_votes(classes: tuple[int, ...]) -> None:
    config = ScanConfig(waves=False)
    benign = pbe_fast.scan(Neighbours(), _only(classes), config=config, device="cpu", precision="fp32")
    moved = benign.level.counts - benign.level.counts.diagonal().diag()
    assert (moved.max(1).values >= 0.4 * moved.sum(1)).all()  # twice an even share, label by label
    assert benign.verdict == "none"


def test_a_class_or_two_say_nothing() -> None:
    with pytest.raises(InputError, match="rightly of 2 of 6 classes; accepted: of half of the classes"):
        pbe_fast.scan(Neighbours(), _only((2, 3)), device="cpu", precision="fp32")
    alone = ScanLevel("most", 0.1, torch.tensor([[0, 9, 1], [0, 0, 0], [0, 0, 0]]))
    assert alone.p_value("all_to_all") == 1
    assert alone.p_value("all_to_one") < 1


def test_the_share_of_labels_that_vote() -> None:
    counts = torch.tensor([[5, 3, 2], [0, 10, 0], [1, 4, 5]])
    level = ScanLevel("most", 0.1, counts)
    assert level.largest("all_to_all").represented == pytest.approx(2 / 3)
    # Label 1 has the largest share; of the two others both vote.
    assert level.largest("all_to_one").represented == 1
    alone = ScanLevel("most", 0.1, torch.tensor([[0, 9, 1], [0, 0, 0], [0, 0, 0]]))
    assert alone.largest("all_to_one").represented == 0.5
    few, all_of_them = alone.largest("all_to_one"), Largest(0.9, 10, 3, 2)
    assert few.p_value(2.0) == pytest.approx(all_of_them.p_value(1.0))
    assert few.p_value(2.0) > all_of_them.p_value(2.0)


def test_the_radii_rise_until_one_is_beyond(to_one: ScanResult) -> None:
    radii = [level for level in to_one.levels if level.window is None and level.name != "waves"]
    names = [level.name for level in radii]
    assert [name for name in names if name] == [n for n in ("quarter", "most", "beyond") if n in names]
    assert names[-2:] == ["most", "beyond"]
    eps = [level.eps for level in radii]
    assert eps[:-1] == list(ScanConfig().eps[: len(eps) - 1])
    assert eps[-1] == min(e for e in ScanConfig().eps if e >= 2 * eps[-2])
    for level in radii:
        assert level.counts.sum() == to_one.images
        if level.name is None:
            assert level.moved < 0.75
        if level.name == "quarter":
            assert 0.25 <= level.moved < 0.75
        if level.name == "most":
            assert level.moved >= 0.75
    assert to_one.level in to_one.levels


class Patch(Stripes):
    """A saturated corner, which no small ball around an image holds, leads to ``target``."""

    def forward(self, images: Tensor) -> Tensor:
        assert self.target is not None
        saturated = F.softplus(40 * (images[:, 0, 0, :1] - 0.9))
        return Stripes.forward(Stripes(), images) + 20 * saturated * F.one_hot(torch.tensor(self.target), K)


def test_a_patch_is_found_in_a_window() -> None:
    without = _scan(Patch(target=2), patch_windows=(), waves=False)
    assert without.verdict == "none" and all(level.window is None for level in without.levels)
    found = _scan(Patch(target=2), patch_windows=(0.25,), waves=False)
    assert (found.verdict, found.target_label) == ("all_to_one", 2)
    assert (found.level.name, found.level.window, found.level.eps) == ("patch 1/4", 0.25, 1.0)
    assert "in a window of a quarter of the side" in found.summary()
    report = found.to_dict()
    assert report["window"] == 0.25
    assert [level["window"] for level in report["levels"]] == [None] * len(without.levels) + [0.25]
    # Windows come last: the radii draw the same numbers with them and without.
    for ours, theirs in zip(found.levels, without.levels, strict=False):
        assert torch.equal(ours.counts, theirs.counts)


def test_windows_of_as_many_pixels_are_tested_once() -> None:
    # Of four rows an eighth and a quarter are one pixel each.
    assert [level.window for level in _scan(Stripes()).levels if level.window is not None] == [0.25]


@pytest.mark.parametrize("misled", [0, 1, 4])
def test_a_window_that_moves_next_to_nothing_says_nothing(misled: int) -> None:
    counts = torch.full((10,), 50).diag()
    counts[1 : 1 + misled, 0] = 1
    level = ScanLevel("patch 1/8", 1.0, counts, 0.125)
    assert level.p_value("all_to_one") == 1
    assert level.largest("all_to_one").critical(0.01, 3.0) == math.inf
    assert level.to_dict()["all_to_one"]["p_value"] == 1


def test_windows_are_asked_for_a_label_alone() -> None:
    counts = torch.ones(4, 4, dtype=torch.int64)
    radius, windows, tried = (ScanLevel(name, 0.1, counts) for name in ("most", "patch 1/4", None))
    assert radius.settings == ("all_to_one", "all_to_all")
    assert windows.settings == ("all_to_one",) and "all_to_all" not in windows.to_dict()
    assert tried.settings == ()
    # The smallest p-value is multiplied by the number of those that were looked at.
    alone = most_suspicious((windows,))
    assert alone[1:] == ("all_to_one", windows.p_value("all_to_one"))


def test_only_images_that_the_model_answers_rightly_are_attacked_each_label_alike() -> None:
    data = _stripes(600)
    labels = data.labels.clone()
    labels[labels == 0] = torch.where(torch.arange(100) < 80, 1, 0)  # 80 that it answers with 0
    mixed = ImageSet(data.images, labels, data.class_names)
    config = ScanConfig(images=90, eps=(1 / 255, 64 / 255))
    found = pbe_fast.scan(Stripes(), mixed, config=config, device="cpu", precision="fp32")
    assert found.images == 90
    assert found.matrix.sum(1).tolist() == [15] * K
    # A radius of one grey level moves nothing: all were right to begin with.
    assert found.levels[0].moved == 0


def test_of_many_classes_two_images_of_each_are_attacked_whatever_was_asked_for() -> None:
    # Of fewer than half of the classes nothing would be tested.
    found = _scan(Stripes(target=4), images=3)
    assert found.images == 2 * K
    assert found.matrix.sum(1).tolist() == [2] * K


def test_the_model_and_the_random_state_stay_as_they_were_and_a_seed_fixes_the_result() -> None:
    model = Stripes(target=2).train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (pbe_fast.scan(model, _stripes(), seed=3, device="cpu", precision="fp32") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.gain.requires_grad and model.gain.grad is None
    assert {**first.to_dict(), "seconds": 0} == {**again.to_dict(), "seconds": 0}


class Buffered(Stripes):
    """Without parameters."""

    def __init__(self) -> None:
        super().__init__(target=4)
        gain = self.gain.detach()
        del self.gain
        self.register_buffer("gain", gain)


def test_a_model_without_parameters() -> None:
    assert _scan(Buffered()).target_label == 4


def test_images_too_few_to_find_anything_bring_a_warning() -> None:
    with pytest.warns(
        PBEWarning,
        match=r"too few images, or .* to find a backdoor \(all_to_one\).*: got 6 that .*, of 6 labels",
    ) as seen:
        found = pbe_fast.scan(Stripes(target=4), _stripes(6), device="cpu", precision="fp32")
    assert found.verdict == "none" and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pbe_fast.scan(Stripes(), _stripes(60), device="cpu", precision="fp32")


def test_what_is_refused() -> None:
    two = ImageSet(_stripes().images, _stripes().labels % 2, ("a", "b"))
    with pytest.raises(InputError, match="got 2; accepted: 3 or more"):
        pbe_fast.scan(Stripes(), two, device="cpu")
    with pytest.raises(InputError, match="accepted: larger eps"):
        _scan(Stripes(), eps=(0.5 / 255, 1 / 255))
    wrong = ImageSet(_stripes().images, (_stripes().labels + 1) % K, tuple("abcdef"))
    with pytest.raises(InputError, match="none that the model answers"):
        pbe_fast.scan(Stripes(), wrong, device="cpu")
    with pytest.raises(InputError, match="seed; got '1'; accepted: a whole number"):
        pbe_fast.scan(Stripes(), _stripes(), seed="1", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a dict of options is ScanConfig"):
        pbe_fast.scan(Stripes(), _stripes(), config={"images": 3}, device="cpu")  # type: ignore[arg-type]
    for options in ({"eps": (0.2, 0.1)}, {"eps": ()}, {"significance": 1.0}, {"images": 0}, {"norm": "l1"}):
        with pytest.raises(InputError, match=next(iter(options))):
            ScanConfig(**options)
    assert ScanConfig(patch_windows=(0.25, 0.125)).patch_windows == (0.25, 0.125)
    for windows in ((0.125, 0.125), (0.2,), (0.0,), (0.5,), (math.nan,)):
        with pytest.raises(InputError, match=r"option 'patch_windows'.*accepted: of 0\.125, 0\.25, each once, or none"):
            ScanConfig(patch_windows=windows)


def test_a_level_by_hand() -> None:
    counts = torch.tensor([[5, 3, 2], [0, 10, 0], [1, 4, 5]])
    level = ScanLevel("most", 0.1, counts)
    assert level.moved == pytest.approx(1 / 3)
    assert level.histogram.tolist() == [1, 7, 2]
    largest = level.largest("all_to_one")
    assert (largest.share, largest.total) == (pytest.approx(0.7), 10)
    assert level.largest("all_to_all").total == 10
    assert (largest.candidates, largest.destinations) == (3, 2)


def test_the_folder_that_is_saved(to_one: ScanResult, tmp_path: Path) -> None:
    out = to_one.save(tmp_path / "scan", note="mine")
    assert {p.name for p in out.iterdir()} == {"scan.png", "report.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["scan"] == json.loads(json.dumps(to_one.to_dict()))
    assert report["note"] == "mine" and "scan.png" in report["sha256"]["outputs"]
    assert report["scan"]["levels"][-1]["counts"] == to_one.levels[-1].counts.tolist()
    with pytest.raises(OutputError, match="already holds a run"):
        to_one.save(out)
