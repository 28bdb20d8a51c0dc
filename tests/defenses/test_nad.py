from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.baselines import BASELINES, NADConfig
from pbe_fast.defenses import nad
from pbe_fast.defenses.nad import Distiller, attention_loss, attention_map
from pbe_fast.engine.forward import to_input
from pbe_fast.errors import InputError
from pbe_fast.models import outputs_of

CONFIG = NADConfig(
    finetune=dataclasses.replace(BASELINES["nad"].finetune, batch_size=70),
    teacher_epochs=2, epochs=3, min_updates=0, betas=(1.0, 7.0, 3.0),
)  # fmt: skip


def literal_map(activations: Tensor, power: float) -> list[list[float]]:
    """The definition, number by number."""
    rows = []
    for image in activations.tolist():
        height, width = len(image[0]), len(image[0][0])
        row = [sum(abs(channel[y][x]) ** power for channel in image) for y in range(height) for x in range(width)]
        norm = math.sqrt(sum(v * v for v in row))
        rows.append([v / norm for v in row])
    return rows


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_attention_by_its_definition(power: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 4, 2), torch.randn(3, 2, 4, 2)
    maps = [torch.tensor(literal_map(a, power)) for a in (student, teacher)]
    torch.testing.assert_close(attention_map(student, power), maps[0])
    torch.testing.assert_close(attention_loss(student, teacher, power), ((maps[0] - maps[1]) ** 2).mean())
    assert attention_map(torch.zeros(1, 2, 3, 3), power).isfinite().all()


def test_the_loss_is_cross_entropy_and_the_attention_terms(infected: Any) -> None:
    torch.manual_seed(0)
    student, guide = (copy.deepcopy(infected.model) for _ in range(2))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images, labels = to_input(infected.clean.images[:20]), infected.clean.labels[:20]
    betas = {"net.bn2": 3.0, "net.bn3": 5.0}
    tuner = Distiller(
        copy.deepcopy(student), CONFIG.finetune, total_steps=1, generator=torch.Generator(),
        guide=guide, betas=betas, power=2.0,
    )  # fmt: skip
    found = tuner._clean_loss(images, labels)
    with outputs_of(student.train(), betas) as a, outputs_of(guide.eval(), betas) as b:
        logits, _ = student(images), guide(images)
    expected = F.cross_entropy(logits, labels)
    for name, beta in betas.items():
        expected = expected + beta * attention_loss(a[name], b[name], 2.0)
    torch.testing.assert_close(found, expected)
    assert found > F.cross_entropy(logits, labels) + 1e-4


def test_the_stages_and_the_last_weights_of_a_network_with_two(infected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    original = Distiller.__init__

    def listen(self: Distiller, model: nn.Module, config: Any, **options: Any) -> None:
        seen.update(options, model=model)
        original(self, model, config, **options)

    monkeypatch.setattr(Distiller, "__init__", listen)
    result = nad(infected.model, infected.clean, config=CONFIG, device="cpu", precision="fp32", progress=False)
    assert seen["betas"] == {"net.bn2": 7.0, "net.bn3": 3.0}
    assert [(e["step"], e["updates"]) for e in result.history] == [("teacher", 4), ("distillation", 6)]
    assert result.history[1]["finding"] == "attention at net.bn2, net.bn3"
    # The teacher is a fine-tuned copy that learns no more; the student is what comes back.
    before = int(infected.model.net.bn1.num_batches_tracked)
    assert int(seen["guide"].net.bn1.num_batches_tracked) - before == 4
    assert int(result.model.net.bn1.num_batches_tracked) - before == 6
    assert not seen["guide"].training and not any(p.requires_grad for p in seen["guide"].parameters())


def test_a_network_without_stages(infected: Any) -> None:
    with pytest.raises(InputError, match="no module whose output is"):
        nad(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), infected.clean, device="cpu", progress=False)
