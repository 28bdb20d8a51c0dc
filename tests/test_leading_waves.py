"""Which waves lead a model, of models that are led by one frequency, by many or by none."""

from __future__ import annotations

import pytest
import torch
from led import CLASSES, Led, pictures
from torch import nn

from pbe_fast.config import WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.leading_waves import LeadingWaves, SlowWaves, leading_waves, standing_out


def look(model: nn.Module, data: ImageSet | None = None, **options: float) -> LeadingWaves:
    generator = torch.Generator().manual_seed(0)
    return leading_waves(model.eval(), data or pictures(), WaveConfig(**options), generator=generator)


def slow_waves(data: ImageSet) -> SlowWaves:
    return SlowWaves(data, WaveConfig(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frequency", [(0, 6), (5, 0), (-4, 3), (8, 8)])
def test_a_wave_that_leads_to_a_label_is_found_with_its_frequency(frequency: tuple[int, int]) -> None:
    found = look(Led([frequency]))
    assert found.labels.tolist() == [k == 2 for k in range(CLASSES)]
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


@pytest.mark.parametrize("target", [2, None])
def test_logits_that_are_no_numbers_vote_for_nothing(target: int | None) -> None:
    class Breaks(Led):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            # Of whole sets and of one picture: so many are seen at a time.
            return torch.where(torch.arange(len(images))[:, None] == 5, torch.nan, logits)

    found = look(Breaks([(0, 6)], target=target, shift=0))
    assert found.labels.nonzero().flatten().tolist() == ([] if target is None else [target])


def test_waves_too_weak_or_too_slow_lead_nowhere() -> None:
    model = Led([(0, 6)])
    assert look(model, amplitude=0.2).frequencies != ()
    assert look(model, amplitude=0.05).frequencies == ()
    assert look(model, max_cycles=3.0).frequencies == ()


def test_the_mean_is_over_images_of_other_labels_and_each_frequency_has_both_signs() -> None:
    model, data = Led([(0, 6)]), pictures(80)
    to_label, by_shift = slow_waves(data).mean_probabilities(model)
    assert to_label.shape == (17, 17, CLASSES) and by_shift.shape == (17, 17, CLASSES - 1)
    torch.testing.assert_close(to_label, to_label.flip(0, 1))
    torch.testing.assert_close(by_shift, by_shift.flip(0, 1))
    # As they are, all are answered rightly; with the wave all others go to label 2, which is a shift of each size.
    assert to_label[8, 8].max() < 1e-3 and by_shift[8, 8].max() < 1e-3
    assert to_label[8, 14].tolist() == pytest.approx([float(k == 2) for k in range(CLASSES)], abs=1e-3)
    assert by_shift[8, 14].tolist() == pytest.approx([1 / CLASSES] * (CLASSES - 1), abs=1e-3)
    counts = slow_waves(data).reached(model, (0, 6))
    assert counts.tolist() == [[10 * (k == 2) for k in range(CLASSES)]] * CLASSES
    assert torch.equal(slow_waves(data).reached(model, (0, 0)), 10 * torch.eye(CLASSES, dtype=torch.int64))


def test_of_few_labels_few_images_or_no_right_answer_nothing_is_said() -> None:
    data = pictures()
    some_labels = ImageSet(data.images, data.labels % 7, tuple("abcdefg"))
    wrong = ImageSet(data.images, (data.labels + 1) % CLASSES, data.class_names)
    for some in (some_labels, wrong, pictures(63)):
        found = look(Led([(0, 6)]), some)
        assert found.frequencies == () and found.labels.shape == (some.num_classes,)
    assert look(Led([(0, 6)]), pictures(64)).frequencies == ((0, 6),)


def test_each_label_has_one_vote_however_many_images() -> None:
    data = pictures(320)
    many = (data.labels == 5) | (torch.arange(320) < 64)
    uneven = data.select(many.nonzero()[:, 0])
    assert look(Led([(-2, 6)]), uneven).labels.tolist() == [k == 2 for k in range(CLASSES)]
    _, by_shift = slow_waves(uneven).mean_probabilities(Led([(-2, 6)]))
    assert by_shift[6, 14].max() == pytest.approx(1 / CLASSES, abs=1e-3)


def test_pictures_of_a_pixel_or_two_have_no_waves() -> None:
    tiny = ImageSet(torch.zeros(80, 1, 1, 1, dtype=torch.uint8), torch.arange(80) % 8, tuple("abcdefgh"))
    probabilities = torch.full((1, 1, 8), 0.9)
    assert standing_out(probabilities)[0].tolist() == [0.0] * 8
    assert slow_waves(tiny).pictures(0, 0).shape == (80, 1, 1, 1)
