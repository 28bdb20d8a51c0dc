"""A small infected model that trains in a second: which quarter of a noisy image is bright."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.forward import predict_logits
from pbe_fast.extra_set import initial_extra_set, judging_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner
from pbe_fast.leading_waves import LeadingWaves
from pbe_fast.purify import purify
from pbe_fast.result import PurifyResult

SHAPE = (1, 8, 8)
PLAIN = FineTuneConfig(lr=0.02, batch_size=32, augment="none")
QUICK = PurifyConfig(
    pgd=PGDConfig(eps=0.05, steps=2),
    finetune=PLAIN,
    adversarial_steps=9,
    clean_steps=3,
    clean_epochs=1,
    fractions=(0.1, 0.25, 0.5),
    initial="random",
)


def quarters(n: int = 160, seed: int = 0, classes: int = 4, names: str = "") -> ImageSet:
    """Four classes: which quarter of a noisy image is bright. Or eight: and how bright. There may be more names."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.randint(0, 60, (n, *SHAPE), dtype=torch.uint8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label % 4 // 2), 4 * (label % 2)
        images[i, 0, row : row + 3, column : column + 3] += 120 if label < 4 else 190
    return ImageSet(images, labels, tuple(names or "abcdefgh"[:classes]), name="quarters")


def network(classes: int = 4) -> nn.Module:
    """Not yet trained."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, classes),
    )


def infect(classes: int = 4, names: str = "") -> InfectedModel:
    """BadNets, with a tenth of `quarters` poisoned."""
    data = quarters(classes=classes, names=names)
    training = FineTuneConfig(lr=0.05, batch_size=32, augment="none", mix_clean=False, distill_weight=0.0)
    config = AttackConfig(attack="badnets", epochs=8, training=training)
    model = network(data.num_classes)
    return train_infected(model, data, config=config, device="cpu", precision="fp32", progress=False)


def run(model: nn.Module, train: Any = None, clean: Any = None, *, seed: int = 0, **options: Any) -> PurifyResult:
    """`purify` with `QUICK` and further options."""
    config = dataclasses.replace(QUICK, **options)
    return purify(
        model, train, clean_data=clean, config=config, seed=seed, device="cpu", precision="fp32", progress=False
    )


def logits(model: nn.Module) -> Tensor:
    """Of other images."""
    return predict_logits(model, quarters(seed=9).images)


@dataclasses.dataclass
class Seen:
    """What the parts of a run were asked."""

    left_out: list[list[int]] = dataclasses.field(default_factory=list)
    fragile: list[bool] = dataclasses.field(default_factory=list)
    steady: list[bool] = dataclasses.field(default_factory=list)
    taught: list[str | None] = dataclasses.field(default_factory=list)
    unchanged_at_start: list[bool] = dataclasses.field(default_factory=list)


def watch(
    monkeypatch: pytest.MonkeyPatch,
    infected: InfectedModel,
    *,
    attracting: list[int],
    changed: Callable[[Tensor], Tensor] | None = None,
    waves: LeadingWaves | None = None,
) -> Seen:
    """What a run does in which the attack leads to given labels, and slow waves to none or as given."""
    seen = Seen()
    rounds, restart = sys.modules["pbe_fast.rounds"], FineTuner.restart

    def first(*arguments: Any, **keywords: Any) -> Tensor:
        seen.left_out.append(arguments[2].nonzero()[:, 0].tolist())
        seen.fragile.append(keywords["fragility"] is not None)
        return initial_extra_set(*arguments, **keywords)

    def judging(*arguments: Any) -> Tensor:
        seen.left_out.append(arguments[2].nonzero()[:, 0].tolist())
        return judging_extra_set(*arguments)

    def following(*arguments: Any, **keywords: Any) -> Tensor:
        seen.steady.append(keywords["steady"] is not None)
        return next_extra_set(*arguments, **keywords)

    def restarted(self: FineTuner, **keywords: Any) -> None:
        if keywords["total_steps"] > 1:  # a round, not the making of the tuner
            how = "right" if keywords["where_right"] else "all"
            seen.taught.append(how if keywords["teacher"] is not None else None)
            state = infected.model.state_dict()
            same = all(torch.equal(value, state[name]) for name, value in self._model.state_dict().items())
            seen.unchanged_at_start.append(same)
        restart(self, **keywords)

    classes = infected.train_data.num_classes
    monkeypatch.setattr(
        rounds, "attracting_labels", lambda counts: torch.tensor([k in attracting for k in range(classes)])
    )
    none = LeadingWaves(torch.zeros(classes, dtype=torch.bool), None, ())
    monkeypatch.setattr(rounds, "leading_waves", lambda *arguments, **keywords: waves or none)
    monkeypatch.setattr(rounds, "initial_extra_set", first)
    monkeypatch.setattr(rounds, "judging_extra_set", judging)
    monkeypatch.setattr(rounds, "next_extra_set", following)
    monkeypatch.setattr(FineTuner, "restart", restarted)
    if changed is not None:
        monkeypatch.setattr(rounds, "changed_labels", changed)
        monkeypatch.setattr(rounds, "label_ahead", lambda distances: torch.zeros(len(distances), dtype=torch.bool))
    return seen
