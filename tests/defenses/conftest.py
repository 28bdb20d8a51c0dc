"""A small CNN that learned BadNets on scikit-learn's digits, and 140 clean digits that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig
from pbe_fast.data import ImageSet, as_image_set, split
from pbe_fast.metrics import Metrics, evaluate
from pbe_fast.models import Normalized, SmallCNN
from pbe_fast.poison import triggered_test_set


@dataclass(frozen=True)
class Infected:
    attack: InfectedModel
    clean: ImageSet
    test: ImageSet

    @property
    def model(self) -> nn.Module:
        return self.attack.model

    def measure(self, model: nn.Module) -> Metrics:
        return evaluate(model, self.test, triggered_test_set(self.test, self.attack.trigger))


@pytest.fixture(scope="session")
def infected() -> Infected:
    train, test = (as_image_set(f"digits:{part}", progress=False) for part in ("train", "test"))
    clean, train = split(train, 140, seed=0)
    torch.manual_seed(0)
    model = Normalized(SmallCNN(10, width=8), [0.3], [0.35])
    training = FineTuneConfig(lr=0.05, batch_size=64, nesterov=True, warmup=0.1, mix_clean=False, distill_weight=0.0)
    config = AttackConfig(attack="badnets", epochs=10, training=training)
    attack = train_infected(model, train, config=config, device="cpu", precision="fp32", progress=False)
    return Infected(attack, clean, test)
