from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.engine.folding import FrozenCopy, foldable_pairs
from pbe_fast.engine.forward import eval_mode
from pbe_fast.engine.frozen_layers import BesideConv2d, FastGradConv2d, PostOpConv2d, WinogradConv2d
from pbe_fast.models import Normalized, PreActResNet18, SmallCNN
from pbe_fast.torchvision_compat import import_torchvision


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights and statistics as different from their initial values as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def plain(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with eval_mode(model), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        return model(images)  # type: ignore[no-any-return]


class Custom(nn.Module):
    """A convolution and a batch normalisation that `body` uses in its own way."""

    def __init__(self, body: Callable[[Custom, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.other = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)
        self.body = body

    def forward(self, images: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.body(self, images)
        if skip is not None:
            x = x + skip
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS = {
    "preact": (lambda: PreActResNet18(10, width=8), 8),
    "small": (lambda: SmallCNN(10, in_channels=3), 3),
    "normalised": (lambda: Normalized(PreActResNet18(10, width=8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)), 8),
    "resnet": (lambda: import_torchvision().models.resnet18(num_classes=10), 20),
    "mobilenet": (lambda: import_torchvision().models.mobilenet_v2(num_classes=10), 52),
    "densenet": (lambda: import_torchvision().models.DenseNet(8, (2, 2), 16, num_classes=10), 5),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten()), 1),
    "folds": (lambda: Custom(lambda m, x: F.relu(m.bn(m.conv(x)))), 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    make, pairs = NETWORKS[name]
    model, images = settled(make()), pictures(4, 3, 32, 32)
    exact = FrozenCopy(model, image_shape=(3, 32, 32))
    assert len(exact.folded) == pairs
    expected = plain(model, images)
    torch.testing.assert_close(plain(exact, images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # bfloat16 keeps 8 bits, and a product of two rounded numbers, some layers deep, about 6 of them: the same error
    # as autocast makes, in another place.
    got = FrozenCopy(model, dtype=torch.bfloat16, image_shape=(3, 32, 32))(images).float()
    autocast = plain(model, images, torch.bfloat16).float()
    error, unavoidable = (got - expected).norm(), (autocast - expected).norm()
    assert error <= 1.5 * unavoidable + 2e-3 * expected.norm()


def test_without_folding_bfloat16_equals_autocast_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, images = settled(PreActResNet18(10, width=8)), pictures(4, 3, 32, 32)
    got = FrozenCopy(model, dtype=torch.bfloat16)
    assert got.folded == ()
    with torch.no_grad():
        assert torch.equal(got(images), plain(model.to(memory_format=torch.channels_last), images, torch.bfloat16))  # type: ignore[call-overload]


def _control_flow(m: Custom, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.bn(x) if x.mean() > 0 else x  # type: ignore[no-any-return]


LEFT_ALONE = {
    "shared batch normalisation": lambda m, x: m.bn(m.other(m.bn(m.conv(x)))),
    "output used twice": lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
    "convolution used twice": lambda m, x: m.bn(m.conv(x)) + m.conv(x.flip(0)),
    "something between": lambda m, x: m.bn(F.relu(m.conv(x))),
    "control flow by value": _control_flow,
    "control flow by size": lambda m, x: m.bn(m.conv(x)) if x.shape[0] > 2 else m.conv(x),
    "weight used elsewhere": lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
    "statistics used elsewhere": lambda m, x: m.bn(m.conv(x)) + x.mean() * m.bn.running_mean.view(1, -1, 1, 1),
    "attribute of the normalisation": lambda m, x: m.bn(m.conv(x)) * m.bn.eps,
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_folded_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    model, images = settled(Custom(LEFT_ALONE[name])), pictures(4, 3, 8, 8)
    shadow = FrozenCopy(model, image_shape=(3, 8, 8))
    assert shadow.folded == ()
    torch.testing.assert_close(plain(shadow, images), plain(model, images), rtol=1e-6, atol=1e-6)


def _batch_statistics(model: Custom) -> None:
    model.bn = nn.BatchNorm2d(6, track_running_stats=False)


def _two_names(model: Custom) -> None:
    model.again = model.bn


def _derived(model: Custom) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.conv = Doubled(3, 6, 3)


CHANGES = {
    "hook on the convolution": lambda m: m.conv.register_forward_hook(lambda module, given, out: out * 2),
    "hook on the normalisation": lambda m: m.bn.register_forward_pre_hook(lambda module, given: (given[0] + 1,)),
    "statistics of the batch": _batch_statistics,
    "two names": _two_names,
    "derived type": _derived,
    "parametrised weight": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "patched forward": lambda m: setattr(m.bn, "forward", lambda x: x * 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_changed_modules_are_left_alone(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, images = settled(Custom(lambda m, x: m.bn(m.conv(x)))), pictures(4, 3, 8, 8)
    assert foldable_pairs(model) == [("conv", "bn")]
    CHANGES[name](model)
    shadow = FrozenCopy(model, dtype=dtype, image_shape=(3, 8, 8))
    assert shadow.folded == ()
    torch.testing.assert_close(plain(shadow, images), plain(model, images, dtype), rtol=1e-6, atol=1e-6)


def test_arguments_with_defaults_keep_them() -> None:
    """A symbol in place of ``skip`` would be "not None", and another model would be followed."""
    model = settled(Custom(lambda m, x: m.bn(m.conv(x))))
    assert foldable_pairs(model) == [("conv", "bn")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_come_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, images = settled(PreActResNet18(10, width=8)), pictures(4, 3, 32, 32)
    shadow = FrozenCopy(model, dtype=dtype, image_shape=(3, 32, 32))
    addresses = [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())]
    torch.manual_seed(1)
    other = settled(PreActResNet18(10, width=8), seed=1)
    model.load_state_dict(other.state_dict())
    before = plain(shadow, images)
    shadow.refresh(model)
    assert [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())] == addresses
    fresh = FrozenCopy(other, dtype=dtype, image_shape=(3, 32, 32))
    assert torch.equal(plain(shadow, images), plain(fresh, images))
    assert not torch.allclose(plain(shadow, images), before, atol=0.1)


def test_the_model_is_not_touched() -> None:
    torch.manual_seed(0)
    model = settled(PreActResNet18(10, width=8)).train()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    model(pictures(2, 3, 32, 32)).sum().backward()
    model.load_state_dict(before)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    shadow = FrozenCopy(model, dtype=torch.bfloat16, image_shape=(3, 32, 32))
    shadow.refresh(model)
    shadow(pictures(2, 3, 32, 32))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert not any(m.training for m in shadow.modules())
    assert not any(p.requires_grad or p.grad is not None for p in shadow.parameters())


def test_products_are_held_in_their_dtype_and_the_rest_in_float32() -> None:
    shadow = FrozenCopy(PreActResNet18(10, width=8), dtype=torch.bfloat16, image_shape=(3, 32, 32))
    for name, module in shadow.named_modules():
        for parameter in module.parameters(recurse=False):
            # Our own convolutions have their filters beside the weights, which stay as they are.
            own = (WinogradConv2d, FastGradConv2d, BesideConv2d, PostOpConv2d)
            is_product = isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, own)
            wanted = torch.bfloat16 if is_product else torch.float32
            assert parameter.dtype == wanted, name


def test_a_parameter_of_two_modules_stays_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12))
    model[2].weight = model[1].weight
    shadow = FrozenCopy(model, dtype=torch.bfloat16, image_shape=(3, 2, 2))
    with torch.no_grad():
        model[1].weight.mul_(2)
    shadow.refresh(model)
    images = pictures(2, 3, 2, 2)
    torch.testing.assert_close(plain(shadow, images), plain(model, images, torch.bfloat16))


def test_new_weights_come_in_lists_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(PreActResNet18(4, width=4))
    shadow = FrozenCopy(model, dtype=torch.bfloat16, image_shape=(3, 16, 16))
    copy_, seen = torch._foreach_copy_, []

    def watched(targets: list[Tensor], sources: list[Tensor]) -> None:
        seen.append(([t.dtype for t in targets], [t.dtype for t in sources]))
        copy_(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    settled(model, seed=5)
    shadow.refresh(model)
    assert len(seen) == 3
    assert all(len(set(dtypes)) == 1 for call in seen for dtypes in call)
    fresh = FrozenCopy(model, dtype=torch.bfloat16, image_shape=(3, 16, 16))
    for name, value in fresh.state_dict().items():
        assert torch.equal(shadow.state_dict()[name], value), name


class Sometimes(nn.Module):
    """Normalises every second time, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (self.norm(x) if random.random() < 0.5 else x).mean((2, 3))


def test_nothing_is_folded_where_dice_decide() -> None:
    for seed in range(8):
        random.seed(seed)
        assert foldable_pairs(Sometimes()) == []
