from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.errors import InputError
from pbe_fast.models import (
    Normalized,
    SmallCNN,
    batch_norms,
    build_model,
    conv_stages,
    features,
    last_linear,
    outputs_of,
)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("arch", ["preact_resnet18", "small_cnn", "resnet18"])
def test_features_are_what_the_head_turns_into_logits(arch: str) -> None:
    torch.manual_seed(0)
    width = None if arch == "resnet18" else 4
    model = build_model(arch, num_classes=5, width=width, mean=[0.5] * 3, std=[0.2] * 3).eval()
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found = features(model, x)
        torch.testing.assert_close(last_linear(model)(found), model(x), rtol=0, atol=0)
    assert hooks(model) == 0


def test_mode_and_gradients_are_the_callers() -> None:
    model = SmallCNN(3, width=4).train()
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    features(model, x).sum().backward()
    assert x.grad is not None
    assert model.training
    assert model.bn1.num_batches_tracked.item() == 1


class KeywordHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(input=x.flatten(1))
        return logits


def test_a_head_called_by_keyword() -> None:
    x = torch.rand(3, 1, 2, 2)
    assert torch.equal(features(KeywordHead(), x), x.flatten(1))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_the_hook_goes_after_an_error_too() -> None:
    model = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        features(model, torch.rand(1, 1, 2, 2))
    assert hooks(model) == 0


def test_models_without_such_features() -> None:
    x = torch.rand(2, 1, 3, 2)
    with pytest.raises(InputError, match="without a linear layer; got Conv2d"):
        features(nn.Conv2d(1, 1, 1), x)
    with pytest.raises(InputError, match="not used"):
        features(Unused(), x)
    with pytest.raises(InputError, match=r"\(2, 1, 3, 2\) at the last linear layer"):
        features(Normalized(nn.Linear(2, 2), [0.0], [1.0]), x)


# Stages


@pytest.mark.parametrize(
    ("arch", "size", "expected"),
    [
        ("preact_resnet18", 32, ["net.layer2", "net.layer3", "net.layer4"]),
        ("resnet18", 64, ["net.layer2", "net.layer3", "net.layer4"]),
        ("small_cnn", 16, ["net.bn2", "net.bn3"]),
        # Its average pooling makes 7x7 of 2x2: that is no further stage.
        ("torchvision:vgg11", 64, ["net.features.14", "net.features.19", "net.features.20"]),
    ],
)
def test_stages_end_where_the_size_changes(arch: str, size: int, expected: list[str]) -> None:
    width = 4 if arch in ("preact_resnet18", "small_cnn") else None
    model = build_model(arch, num_classes=5, width=width, mean=[0.5] * 3, std=[0.2] * 3).eval()
    assert conv_stages(model, torch.rand(1, 3, size, size), 3) == expected
    assert conv_stages(model, torch.rand(1, 3, size, size), 2) == expected[-2:]
    assert hooks(model) == sum(len(m._forward_hooks) for m in model.modules()) == 0


def test_a_network_without_stages() -> None:
    with pytest.raises(InputError, match="no module whose output is"):
        conv_stages(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), 3)


def test_outputs_are_the_last_ones_and_listening_ends() -> None:
    model = SmallCNN(3, width=4).eval()
    with outputs_of(model, ["conv1", "linear"]) as outputs:
        model(torch.rand(2, 1, 8, 8))
        x = torch.rand(3, 1, 8, 8)
        logits = model(x)
    assert list(outputs) == ["conv1", "linear"]
    assert torch.equal(outputs["conv1"], model.conv1(x)) and torch.equal(outputs["linear"], logits)
    assert not any(m._forward_hooks for m in model.modules())


def test_batch_norms_are_those_with_weights() -> None:
    assert list(batch_norms(Normalized(SmallCNN(3, width=4), [0.5], [0.5]))) == ["net.bn1", "net.bn2", "net.bn3"]
    with pytest.raises(InputError, match="without batch normalisation; got Sequential"):
        batch_norms(nn.Sequential(nn.BatchNorm2d(3, affine=False)))
