from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.errors import InputError
from pbe_fast.metrics import attack_success, average_precision, evaluate


class Reads(nn.Module):
    """Predicts the label that is written into the first pixel."""

    def forward(self, images: Tensor) -> Tensor:
        written = (images[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(written, 4).float()


def _written(predictions: list[int]) -> Tensor:
    images = torch.full((len(predictions), 1, 2, 2), 99, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(predictions)
    return images


def _set(predictions: list[int], labels: list[int], true_labels: list[int] | None = None) -> ImageSet:
    truth = None if true_labels is None else torch.tensor(true_labels)
    return ImageSet(_written(predictions), torch.tensor(labels), tuple("abcd"), true_labels=truth)


def test_acc_is_the_share_of_right_predictions() -> None:
    metrics = evaluate(Reads(), _set([0, 1, 2, 3, 0], [0, 1, 2, 0, 1]))
    assert metrics.to_dict() == {"acc": 0.6, "asr": None, "asr_with_target": None, "recovered_acc": None}


@pytest.mark.parametrize("thing", ["model.pt", None, Reads, {}])
def test_what_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match=r"model; got .*accepted: a torch\.nn\.Module that returns logits"):
        evaluate(thing, _set([0], [0]))  # type: ignore[arg-type]


def test_images_of_the_target_class_are_left_out_of_asr_and_recovered_acc() -> None:
    # Target 0; the first three images are of that class already.
    triggered = _set([0, 0, 1, 0, 0, 0, 2, 3], [0] * 8, [0, 0, 0, 1, 1, 2, 2, 2])
    metrics = evaluate(Reads(), _set([1], [1]), triggered)
    assert metrics.acc == 1
    assert metrics.asr == pytest.approx(3 / 5)
    assert metrics.asr_with_target == pytest.approx(5 / 8)
    assert metrics.recovered_acc == pytest.approx(1 / 5)


def test_all_to_all_counts_every_image() -> None:
    true = [0, 1, 2, 3]
    triggered = _set([1, 2, 2, 3], [(y + 1) % 4 for y in true], true)
    metrics = evaluate(Reads(), _set([1], [1]), triggered)
    assert metrics.asr == metrics.asr_with_target == 0.5
    assert metrics.recovered_acc == 0.5


def test_where_all_images_are_of_the_target_class_there_is_no_asr() -> None:
    values = attack_success(torch.tensor([0, 1]), _set([0, 0], [0, 0], [0, 0]))
    assert math.isnan(values["asr"])
    assert math.isnan(values["recovered_acc"])
    assert values["asr_with_target"] == 0.5


def test_a_triggered_set_without_the_truth_is_refused() -> None:
    with pytest.raises(InputError, match="triggered test set without true labels; got image set 'images'"):
        evaluate(Reads(), _set([1], [1]), _set([0], [0]))


def test_they_fit_into_json() -> None:
    triggered = _set([0, 0], [0, 0], [1, 2])
    values = evaluate(Reads(), _set([1], [1]), triggered).to_dict()
    assert json.loads(json.dumps(values)) == {"acc": 1, "asr": 1, "asr_with_target": 1, "recovered_acc": 0}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_average_precision_equals_sklearn_s(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    positives = torch.rand(200, generator=generator) < share
    scores = torch.randn(200, generator=generator) + positives
    got = average_precision(scores.argsort(descending=True), positives)
    assert got == pytest.approx(average_precision_score(positives, scores))


def test_average_precision_by_hand() -> None:
    positives = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([0, 2, 1, 3]), positives) == 1
    assert average_precision(torch.tensor([1, 0, 3, 2]), positives) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(torch.tensor([1, 3, 0, 2]), positives) == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_average_precision_takes_ties_in_the_order_given() -> None:
    # Sklearn has no order within ties: it takes them as one place. Here the ranking has already decided.
    positives = torch.tensor([True, False])
    assert average_precision_score(positives, [0.5, 0.5]) == 0.5
    assert average_precision(torch.tensor([0, 1]), positives) == 1
    assert average_precision(torch.tensor([1, 0]), positives) == 0.5


def test_without_positives_there_is_no_average_precision() -> None:
    assert math.isnan(average_precision(torch.arange(3), torch.zeros(3, dtype=torch.bool)))


def test_sets_in_any_form() -> None:
    images = torch.rand(6, 1, 4, 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    pair = (images, torch.arange(6) % 3)
    assert evaluate(model, pair) == evaluate(model, as_image_set(pair))
