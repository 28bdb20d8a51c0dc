from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe_fast import PurifyConfig, purify
from pbe_fast.config import FineTuneConfig
from pbe_fast.errors import PBEWarning
from pbe_fast.forgetting import forgotten_labels


def test_forgotten_is_what_was_known_and_is_answered_no_more() -> None:
    labels = torch.arange(6).repeat_interleave(20)[:105]  # of the last label five images
    before = torch.ones(105, dtype=torch.bool)
    before[20:31] = False  # label 1: not known to begin with
    after = torch.zeros(105, dtype=torch.bool)
    after[:5] = True  # label 0: a quarter is left
    after[40:43] = True  # label 2: less than a fifth
    assert forgotten_labels(labels, before, after, 7).tolist() == [False, False, True, True, True, False, False]
    after = ~before
    assert not forgotten_labels(labels, before, before, 7).any()
    assert forgotten_labels(labels, before, after, 7).nonzero()[:, 0].tolist() == [0, 2, 3, 4]


class Bands(nn.Module):
    """Answers with the brightest of three bands of columns; it can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.head.weight.copy_(4 * torch.eye(3))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.stack([band.mean((1, 2, 3)) for band in x.chunk(3, 3)], 1))
        return out


# Learns what it is shown and keeps nothing of what it knew.
CARELESS = PurifyConfig(
    finetune=FineTuneConfig(lr=1.0, distill_weight=0.0, augment="none"),
    adversarial_steps=0,
    clean_steps=200,
    clean_epochs=0,
    refining_fractions=(),
)


def banded() -> tuple[Tensor, Tensor]:
    labels = torch.arange(120) % 3
    images = 0.3 * torch.rand(120, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    for image, k in zip(images, labels.tolist(), strict=True):
        image[:, :, 2 * k : 2 * k + 2] += 0.5
    return images, labels


def quiet(train: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        purify(Bands(), train, device="cpu", progress=False, **options)
    return [str(w.message) for w in caught if issubclass(w.category, PBEWarning)]


def test_a_clean_set_without_some_labels_is_told() -> None:
    images, labels = banded()
    config = PurifyConfig(adversarial_steps=1, clean_steps=1, clean_epochs=0, refining_fractions=())
    later = (images[labels > 0], labels[labels > 0])
    (told,) = quiet(None, clean_data=later, config=config)
    assert "no image of 1 of 3 labels (0)" in told
    (told,) = quiet((images, labels), clean_data=later, config=config)
    assert "no image of 1 of 3 labels" in told
    assert not quiet((images, labels), clean_data=(images[:30], labels[:30]), config=config)


def test_a_label_that_is_lost_is_told() -> None:
    images, labels = banded()
    later = (images[labels > 0], labels[labels > 0])
    told = quiet((images, labels), clean_data=later, config=CARELESS)
    assert any("hardly answers any more with 1 of 3 labels (0)" in text for text in told)


def test_warnings_point_to_the_caller() -> None:
    images, labels = banded()
    later = (images[labels > 0], labels[labels > 0])
    with pytest.warns(PBEWarning) as caught:
        purify(Bands(), (images, labels), clean_data=later, config=CARELESS, device="cpu", progress=False)
    assert len(caught) == 2 and {w.filename for w in caught} == {__file__}
