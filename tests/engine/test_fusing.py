from __future__ import annotations

import copy
import random

import pytest
import torch
from straight_through import Rounded
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.engine import fusing, onednn
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.frozen_layers import (
    AffineReLU,
    BesideConv2d,
    FastGradConv2d,
    PostOpConv2d,
    WinogradConv2d,
)
from pbe_fast.kernels import conv3x3
from pbe_fast.models import build_model

SHAPE = (3, 16, 16)
FUSED = (WinogradConv2d, FastGradConv2d, PostOpConv2d)
KINDS = [
    pytest.param(
        "own", marks=pytest.mark.skipif(not conv3x3.is_fast(), reason="no AVX512-BF16 here, or no native build")
    ),
    pytest.param(
        "post-ops", marks=pytest.mark.skipif(not onednn.is_usable(), reason="no bfloat16 in oneDNN, or another oneDNN")
    ),
]


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose convolutions are placed; which are faster is another question."""
    name: str = request.param
    monkeypatch.setattr(fusing, "has_fast_convolutions", lambda device: name == "own")
    monkeypatch.setattr(fusing, "has_post_ops", lambda device: name == "post-ops")
    return name


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """With BN statistics and affine parameters that are no identity."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.3), (module.running_var, 0.5)):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=g) * 0.6 + low)
            nn.init.normal_(module.weight, 1.0, 0.3, generator=g)
            nn.init.normal_(module.bias, 0.0, 0.3, generator=g)
    return model.eval()


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    logits = model(images)
    (grad,) = torch.autograd.grad(logits.float().square().sum(), images)
    return grad


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


class Odd(nn.Module):
    """Sums and ReLUs in all the ways in which they may not, or may, become part of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b, self.c, self.twice = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = self.a(x)
        x = F.relu(a) + a  # its output is used twice
        x = self.b(x).relu_() + x  # a ReLU before the sum
        y = x.clone()
        y += self.c(x)  # in place
        x = y
        x = x + self.twice(self.twice(x))
        x = torch.relu(self.norm(x)) + self.b.bias.view(-1, 1, 1)
        return self.head(x.mean((2, 3)))


class Pairs(nn.Module):
    """Where a 1 x 1 convolution may be computed beside another, and where it must not."""

    def __init__(self) -> None:
        super().__init__()

        def conv(kernel: int, stride: int = 2, padding: int = 0, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(16, 16, kernel, stride, padding, bias=bias)

        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.first_beside = conv(3, padding=1, bias=False), conv(1)
        self.second, self.second_beside = conv(3, padding=1), conv(1)
        self.wide, self.other_stride = conv(5, padding=2), conv(1, stride=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        beside = self.first_beside(x)  # the 1 x 1 one first, and a ReLU of the other
        x = F.relu(self.first(x)) + beside
        x = self.second(x) + self.second_beside(x) + x.mean()  # a third that reads the same images
        return self.head((self.wide(x).mean((2, 3)) + self.other_stride(x).mean((2, 3))).relu())


MODELS = {
    "preact_resnet18": lambda: build_model("preact_resnet18", num_classes=10, width=16),
    "resnet18": lambda: build_model("resnet18", num_classes=10),
    "small_cnn": lambda: build_model("small_cnn", num_classes=10, width=16),
    "odd": Odd,
    "pairs": Pairs,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = trained(MODELS[name]())
    images = torch.rand(4, *SHAPE).contiguous(memory_format=torch.channels_last)
    fused = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    plain = FrozenCopy(model, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    assert any(isinstance(module, FUSED) for module in fused.modules())
    assert not any(isinstance(module, FUSED) for module in plain.modules())
    expected, expected_gradient = exact(images.double()), gradient(exact, images.double())
    for function, value in ((lambda m: m(images), expected), (lambda m: gradient(m, images), expected_gradient)):
        # At most a little further from the exact values than bfloat16 is anyway.
        assert distance(function(fused), value) < 2 * distance(function(plain), value) + 0.01


def test_everything_that_can_be_is_part_of_a_convolution(kind: str) -> None:
    model = trained(MODELS["preact_resnet18"]())
    net = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE).net
    convs = [module for module in net.modules() if isinstance(module, (WinogradConv2d, PostOpConv2d))]
    assert len(convs) == (13 if kind == "own" else 20)
    # The strided ones, too, where they are oneDNN's.
    assert sum(conv.relu for conv in convs) == (5 if kind == "own" else 8)
    norms = [module for module in net.modules() if isinstance(module, AffineReLU)]
    assert len(norms) == 8
    # All blocks but those with a convolution in their shortcut.
    assert sum(norm.passes_on for norm in norms) == 5
    graph = net.graph  # type: ignore[union-attr]
    assert sum(len(node.args) == 2 for node in graph.nodes if node.op == "call_module") == 8


def test_both_gradients_of_a_residual_block_are_one() -> None:
    net = FrozenCopy(trained(MODELS["resnet18"]()), dtype=torch.bfloat16, image_shape=SHAPE).net
    passing = [name for name, module in net.named_modules() if getattr(module, "passes_on", False)]
    blocks = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    assert passing == [f"{block}.conv1" for block in blocks]


class Readers(nn.Module):
    """Images with two readers, of which the second is no sum, or comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, *[16] * 5))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.a(x) * x
        doubled = x + x.sigmoid()
        y = doubled + doubled.tanh()
        y = self.e(self.b(y).relu()) + y  # as in a residual block
        z = self.c(y)
        late = z * 2
        both = late + z
        z = self.d(late) + both
        return self.head(z.mean((2, 3)))


def test_other_readers_keep_their_gradients() -> None:
    torch.manual_seed(0)
    model = trained(Readers())
    images = torch.rand(4, *SHAPE)
    fused = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    passing = [name for name, module in fused.named_modules() if getattr(module, "passes_on", False)]
    assert passing == ["net.b"]
    assert distance(gradient(fused, images), gradient(model, images)) < 0.05


def test_without_gradients_the_images_themselves_are_passed_on() -> None:
    torch.manual_seed(0)
    copied = FrozenCopy(trained(MODELS["resnet18"]()), dtype=torch.bfloat16, image_shape=SHAPE)
    images = torch.rand(2, *SHAPE)
    conv = next(module for module in copied.modules() if getattr(module, "passes_on", False))
    features = torch.rand(2, conv.in_channels, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = copied(images)
        out, same = conv(features)
    assert same is features and not out.requires_grad
    assert torch.equal(logits, copied(images.requires_grad_()).detach())


@pytest.mark.parametrize(
    ("name", "fast", "beside"), [("preact_resnet18", 4, 3), ("resnet18", 4, 3), ("pairs", 4, 1), ("small_cnn", 1, 0)]
)
def test_what_reads_the_same_images_is_computed_together(kind: str, name: str, fast: int, beside: int) -> None:
    net = FrozenCopy(trained(MODELS[name]()), dtype=torch.bfloat16, image_shape=SHAPE).net
    assert sum(isinstance(module, FastGradConv2d) for module in net.modules()) == (fast if kind == "own" else 0)
    assert sum(isinstance(module, BesideConv2d) for module in net.modules()) == (beside if kind == "own" else 0)


@pytest.mark.parametrize("name", ["preact_resnet18", "pairs"])
def test_refresh_brings_new_weights_and_statistics(name: str) -> None:
    torch.manual_seed(0)
    first, second = (trained(MODELS[name](), seed) for seed in range(2))
    images = torch.rand(2, *SHAPE)
    copied = FrozenCopy(first, dtype=torch.bfloat16, image_shape=SHAPE)
    copied.refresh(second)
    fresh = FrozenCopy(second, dtype=torch.bfloat16, image_shape=SHAPE)
    torch.testing.assert_close(copied(images), fresh(images))
    torch.testing.assert_close(gradient(copied, images), gradient(fresh, images))


def test_hooks_and_float32_are_left_alone() -> None:
    model = trained(MODELS["preact_resnet18"]())
    exact = FrozenCopy(model, image_shape=SHAPE)
    assert not any(isinstance(module, FUSED) for module in exact.modules())
    seen = []
    model.get_submodule("layer1.0.conv1").register_forward_hook(lambda *_: seen.append(1))
    hooked = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    hooked(torch.rand(1, *SHAPE))
    assert seen and type(hooked.net.get_submodule("layer1.0.conv1")) is nn.Conv2d


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(Rounded.apply(self.stem(x)))).mean((2, 3)))


def test_a_gradient_of_its_own_is_kept() -> None:
    torch.manual_seed(0)
    model = StraightThrough()
    copied = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    assert isinstance(copied.net, StraightThrough)
    images = torch.rand(2, *SHAPE)
    # Of bfloat16; without the gradient of its own there would be none, at a distance of one.
    assert distance(gradient(copied, images), gradient(model, images)) < 0.3


class Mirroring(nn.Module):
    """Mirrors a batch or not, as some defences do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16 * 14 * 14, 10)
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(3) if random.random() < 0.5 else x
        return self.head(F.relu(self.second(self.conv(x))).flatten(1))


def test_dice_go_on_rolling() -> None:
    model, images = Mirroring(), torch.rand(1, *SHAPE)
    for seed in range(8):
        # Of some seeds the forward passes that are compared all do the same.
        random.seed(seed)
        copied = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
        assert len({float(copied(images)[0, 0]) for _ in range(20)}) == 2


class KeepsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.features = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.features)


def test_a_model_that_keeps_its_features_is_folded_and_fused() -> None:
    torch.manual_seed(0)
    model = trained(KeepsFeatures())
    images = torch.rand(2, *SHAPE)
    gradient(model, images)
    copied = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    assert copied.folded == (("conv", "norm"),)
    assert any(isinstance(module, FUSED) for module in copied.modules())
    assert distance(copied(images), model(images)) < 0.01


class OneByOne(nn.Module):
    """Takes the images apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.conv(self.stem(one)).mean((1, 2)) for one in x.unbind(0)]))


def test_images_without_a_batch() -> None:
    torch.manual_seed(0)
    model, images = OneByOne().eval(), torch.rand(2, *SHAPE)
    copied = FrozenCopy(model, dtype=torch.bfloat16, image_shape=SHAPE)
    assert distance(gradient(copied, images), gradient(model, images)) < 0.02


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet18"])
def test_compiled_it_is_the_same(kind: str, name: str) -> None:
    torch.manual_seed(0)
    copied = FrozenCopy(trained(MODELS[name](), seed=1), dtype=torch.bfloat16, image_shape=SHAPE)
    compiled = torch.compile(copied, backend="aot_eager", dynamic=False, fullgraph=True)
    images = torch.rand(2, *SHAPE).contiguous(memory_format=torch.channels_last)
    before = compiled(images)
    copied.refresh(trained(MODELS[name]()))
    assert not torch.equal(compiled(images), before)
    # The compiler's sums are rounded elsewhere.
    assert distance(compiled(images), copied(images)) <= (0.0 if kind == "own" else 0.02)
    exact = gradient(trained(MODELS[name]()).double(), images.double())
    assert distance(gradient(compiled, images), exact) < 2 * distance(gradient(copied, images), exact) + 0.01
