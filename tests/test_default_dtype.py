"""Where the caller has another default dtype, everything is what it is in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.attack import train_infected
from pbe_fast.baselines import ANPConfig, NeuralCleanseConfig
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig, ScanConfig
from pbe_fast.data import ImageSet
from pbe_fast.defenses import anp, neural_cleanse
from pbe_fast.export import export_onnx, verify_onnx
from pbe_fast.models import Normalized, SmallCNN
from pbe_fast.purify import purify
from pbe_fast.scan import scan
from pbe_fast.triggers import TRIGGERS, make_trigger

SHAPE = (1, 8, 8)
OPTIONS: dict[str, Any] = {"device": "cpu", "precision": "fp32", "progress": False}
PURIFY = PurifyConfig(
    pgd=PGDConfig(eps=0.05, steps=1, random_start=True),
    finetune=FineTuneConfig(batch_size=32, augment="auto"),
    adversarial_steps=9,
    clean_steps=2,
    clean_epochs=0,
    fractions=(0.5,),
    refining_fractions=(0.7,),
    leave_out=False,
)


@pytest.fixture
def data() -> ImageSet:
    """Four classes of which each has one bright quarter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    images = torch.randint(0, 128, (96, *SHAPE), dtype=torch.uint8, generator=generator)
    for k in range(4):
        images[labels == k, :, 2 * k : 2 * k + 2] += 100
    return ImageSet(images, labels, tuple("abcd"))


@pytest.fixture
def model(data: ImageSet) -> nn.Module:
    torch.manual_seed(0)
    net = Normalized(SmallCNN(4, width=4), [0.4], [0.3])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data.images.float() / 255), data.labels).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def double() -> Iterator[Callable[[], None]]:
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(before)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("with_clean_set", [False, True])
def test_purify(model: nn.Module, data: ImageSet, double: Callable[[], None], with_clean_set: bool) -> None:
    clean = data.select(torch.arange(20)) if with_clean_set else None

    def run() -> dict[str, Tensor]:
        return weights(purify(model, data, clean_data=clean, config=PURIFY, **OPTIONS).model)

    expected = run()
    double()
    torch.testing.assert_close(run(), expected)


def test_scan(model: nn.Module, data: ImageSet, double: Callable[[], None]) -> None:
    config = ScanConfig(images=64, steps=2)
    expected = scan(model, data, config=config, **OPTIONS)
    double()
    got = scan(model, data, config=config, **OPTIONS)
    assert got.p_value == pytest.approx(expected.p_value)
    assert [level.counts.tolist() for level in got.levels] == [level.counts.tolist() for level in expected.levels]


def test_baselines(model: nn.Module, data: ImageSet, double: Callable[[], None]) -> None:
    def run() -> list[dict[str, Tensor]]:
        pruned = anp(model, data, config=ANPConfig(iterations=10), **OPTIONS)
        unlearned = neural_cleanse(
            model, data, config=NeuralCleanseConfig(trigger_rounds=2, epochs=1, min_updates=2), **OPTIONS
        )
        return [weights(pruned.model), weights(unlearned.model)]

    expected = run()
    double()
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("attack", ["blend", "input_aware"])
def test_train_infected(model: nn.Module, data: ImageSet, double: Callable[[], None], attack: str) -> None:
    config = AttackConfig(attack=attack, epochs=2)
    assert train_infected(model, data, config=config, **OPTIONS).losses
    double()
    assert train_infected(model, data, config=config, **OPTIONS).losses


@pytest.mark.parametrize("name", [name for name in TRIGGERS if name != "input_aware"])
def test_triggers(name: str, double: Callable[[], None]) -> None:
    images, ids = torch.rand(3, 3, 16, 16, dtype=torch.float32), torch.arange(3)
    expected = make_trigger(name, (3, 16, 16), seed=1).apply(images, ids)
    double()
    got = make_trigger(name, (3, 16, 16), seed=1).apply(images, ids)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_export(model: nn.Module, data: ImageSet, double: Callable[[], None], tmp_path: Path) -> None:
    expected = export_onnx(model, tmp_path / "expected.onnx", image_shape=SHAPE).read_bytes()
    double()
    path = export_onnx(model, tmp_path / "got.onnx", image_shape=SHAPE)
    assert path.read_bytes() == expected
    assert verify_onnx(path, model, data, progress=False).ok
