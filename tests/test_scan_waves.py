"""A scan's slow waves: what no attack on single images leads to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from led import Led, pictures

import pbe_fast
from pbe_fast.calibration import WAVES, fit_waves, wave_critical, wave_p_value
from pbe_fast.config import ScanConfig
from pbe_fast.leading_waves import SlowWaves
from pbe_fast.scan import wave_levels
from pbe_fast.scan_result import ScanResult, WaveLevel

SIDE = (32, 32)


def scanned(model: Led, n: int = 200, side: tuple[int, int] = SIDE, **options: Any) -> ScanResult:
    data = pictures(n, side)
    config = ScanConfig(steps=2, patch_windows=(), **options)
    return pbe_fast.scan(model, data, config=config, device="cpu", precision="fp32", progress=False)


def waves_of(result: ScanResult) -> dict[str, WaveLevel]:
    return {level.setting: level for level in result.levels if isinstance(level, WaveLevel)}


def test_a_wave_that_leads_to_one_label_is_a_backdoor(tmp_path: Path) -> None:
    model = Led([(-2, 6)], side=SIDE)
    found = scanned(model)
    assert (found.verdict, found.target_label, found.shift) == ("all_to_one", 2, None)
    level = found.level
    assert isinstance(level, WaveLevel)
    assert (level.name, level.setting, level.frequency, level.best) == ("waves", "all_to_one", (-2, 6), 2)
    assert level.eps == pytest.approx(0.15)
    assert level.above > 0.9 and level.ahead > 0.8 and found.p_value < 1e-3
    assert found.score == pytest.approx(7.0, abs=0.01)  # all of them, of seven other labels
    assert level.counts[:, 2].sum() == level.counts.sum() == 128
    assert "100 % under a wave of -2 periods down and 6 across, 0 % under those around it" in found.summary()
    found.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())["scan"]
    assert report["level"] == "waves" and report["window"] is None
    (told,) = (entry for entry in report["levels"] if entry["level"] == "waves" and "all_to_one" in entry)
    assert told["frequency"] == [-2, 6] and told["next_above"] == level.next_above < 0.1
    assert (tmp_path / "out" / "scan.png").stat().st_size > 10_000
    # Nothing else sees it.
    blind = scanned(model, waves=False)
    assert blind.verdict == "none" and not waves_of(blind)


def test_where_one_label_has_most_images_a_wave_to_another_is_no_shift() -> None:
    for side in (SIDE, (24, 32)):
        data = pictures(800, side)
        few = (data.labels == 5) | (torch.arange(800) < 160)
        config = ScanConfig(steps=2, patch_windows=(), images=800)
        model = Led([(-2, 6)], side=side)
        found = pbe_fast.scan(
            model, data.select(few.nonzero()[:, 0]), config=config, device="cpu", precision="fp32", progress=False
        )
        assert found.verdict == ("all_to_one" if side == SIDE else "none")


def test_a_wave_that_shifts_every_label_is_one_of_all_to_all() -> None:
    found = scanned(Led([(5, 1)], target=None, shift=2, side=SIDE))
    assert (found.verdict, found.target_label, found.shift) == ("all_to_all", None, 2)
    assert isinstance(found.level, WaveLevel) and found.level.frequency == (5, 1)


def test_a_model_that_no_wave_leads_has_no_backdoor() -> None:
    found = scanned(Led([(3, 3)], target=None, shift=0, side=SIDE))
    assert found.verdict == "none"
    assert all(level.p_value(setting) > 0.1 for setting, level in waves_of(found).items())
    for setting, level in waves_of(found).items():
        assert level.critical(setting, 0.05) > level.shares(setting).max()


def test_what_is_not_calibrated_is_not_asked() -> None:
    # Of a label in pictures smaller than photographs, and of few images.
    small = waves_of(scanned(Led([(0, 6)], side=(24, 32)), side=(24, 32)))
    assert small.keys() == {"all_to_all"} and waves_of(scanned(Led([(0, 6)], side=SIDE))).keys() == WAVES.keys()
    assert waves_of(scanned(Led([(0, 6)], side=SIDE), n=63)) == {}


@pytest.mark.parametrize("setting", ["all_to_one", "all_to_all"])
def test_the_critical_height_has_the_p_value_that_was_asked_for(setting: str) -> None:
    for p in (0.5, 0.01, 1e-6):
        assert wave_p_value(setting, wave_critical(setting, p)) == pytest.approx(p)
    values = [wave_p_value(setting, above / 20) for above in range(-5, 21)]
    assert values == sorted(values, reverse=True) and values[0] > 0.999
    assert wave_p_value(setting, 50.0) == 0 <= wave_p_value(setting, 1.0) < 1e-3


def test_the_distribution_is_fitted_to_what_was_measured() -> None:
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    location, scale = fit_waves((0.4 - 0.05 * (-uniform.log()).log()).tolist())
    assert location == pytest.approx(0.4, abs=0.002) and scale == pytest.approx(0.05, rel=0.03)


def test_a_shift_is_not_ahead_for_being_the_only_one_that_beats_every_label(monkeypatch: pytest.MonkeyPatch) -> None:
    to_label, by_shift = torch.full((17, 17, 8), 0.3), torch.full((17, 17, 7), 0.2)
    by_shift[10, 12, 4] += 0.12  # 0.32, and 0.12 above those around it
    by_shift[3, 5, 1] += 0.09  # 0.29: any label is likelier
    monkeypatch.setattr(SlowWaves, "mean_probabilities", lambda *arguments, **keywords: (to_label, by_shift))
    model, generator = Led([(0, 6)], side=SIDE), torch.Generator().manual_seed(0)
    level = wave_levels(model, pictures(80, SIDE), ScanConfig(), generator)[1]
    assert (level.setting, level.best, level.frequency) == ("all_to_all", 4, (2, 4))
    assert level.above == pytest.approx(0.12) and level.ahead == pytest.approx(0.03)
    by_shift[10, 12, 4] = 0.2
    level = wave_levels(model, pictures(80, SIDE), ScanConfig(), generator)[1]
    assert level.ahead <= 0 and level.p_value("all_to_all") > 0.9
