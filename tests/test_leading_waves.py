"""Which waves lead a model, of models that are led by one frequency, by many or by none."""

from __future__ import annotations

import pytest
import torch
from led import CLASSES, Led, pictures
from torch import nn

from pbe_fast.config import WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.leading_waves import LeadingWaves, SlowWaves, leading_waves


def look(model: nn.Module, data: ImageSet | None = None, **options: float) -> LeadingWaves:
    generator = torch.Generator().manual_seed(0)
    return leading_waves(model.eval(), data or pictures(), WaveConfig(**options), generator=generator)


def slow_waves(data: ImageSet) -> SlowWaves:
    return SlowWaves(data, WaveConfig(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frequency", [(0, 6), (5, 0), (-4, 3), (8, 8)])
def test_a_wave_that_leads_to_a_label_is_found_with_its_frequency(frequency: tuple[int, int]) -> None:
    found = look(Led([frequency]))
    assert found.labels.tolist() == [False, False, True, False, False]
    assert found.shift is None and found.frequencies == (frequency,)


def test_a_wave_that_shifts_every_label_is_found_and_leads_to_none() -> None:
    found = look(Led([(3, -5)], target=None, shift=2))
    assert found.shift == 2 and not found.labels.any()
    assert found.frequencies == ((-3, 5),)


def test_a_model_that_no_wave_leads_is_left_alone() -> None:
    found = look(Led([(3, 5)], target=None, shift=0))
    assert found.frequencies == () and found.shift is None and not found.labels.any()


def test_what_all_fast_waves_do_is_no_trigger() -> None:
    # So benign models do: stripes are a ship, whatever their width.
    fast = [(u, v) for u in range(-8, 9) for v in range(9) if max(abs(u), v) >= 4]
    model = Led(fast)
    assert look(model).frequencies == ()
    reached, _ = slow_waves(pictures()).mean_probabilities(model)
    assert (reached[..., 2] > 0.9).float().mean() > 0.5, "or this shows nothing"


def test_waves_too_weak_or_too_slow_lead_nowhere() -> None:
    model = Led([(0, 6)])
    assert look(model, amplitude=0.2).frequencies != ()
    assert look(model, amplitude=0.05).frequencies == ()
    assert look(model, max_cycles=3.0).frequencies == ()


def test_the_mean_is_over_images_of_other_labels_and_each_frequency_has_both_signs() -> None:
    model, data = Led([(0, 6)]), pictures(50)
    to_label, by_shift = slow_waves(data).mean_probabilities(model)
    assert to_label.shape == (17, 17, CLASSES) and by_shift.shape == (17, 17, CLASSES - 1)
    torch.testing.assert_close(to_label, to_label.flip(0, 1))
    torch.testing.assert_close(by_shift, by_shift.flip(0, 1))
    # As they are, all are answered rightly; with the wave all others go to label 2, which is a shift of each size.
    assert to_label[8, 8].max() < 1e-3 and by_shift[8, 8].max() < 1e-3
    assert to_label[8, 14].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-3)
    assert by_shift[8, 14].tolist() == pytest.approx([0.2] * 4, abs=1e-3)
    counts = slow_waves(data).reached(model, (0, 6))
    assert counts.tolist() == [[0, 0, 10, 0, 0]] * CLASSES
    assert torch.equal(slow_waves(data).reached(model, (0, 0)), 10 * torch.eye(CLASSES, dtype=torch.int64))


def test_of_two_labels_or_no_right_answer_nothing_is_said() -> None:
    data = pictures()
    two = ImageSet(data.images, data.labels % 2, ("a", "b"))
    wrong = ImageSet(data.images, (data.labels + 1) % CLASSES, data.class_names)
    for some in (two, wrong):
        found = look(Led([(0, 6)]), some)
        assert found.frequencies == () and found.labels.shape == (some.num_classes,)
