from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from straight_through import Rounded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pbe_fast.config import FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine import training
from pbe_fast.engine.training import ConvInTraining, NormInTraining, training_form
from pbe_fast.finetune import FineTuner
from pbe_fast.kernels.batch_norm import is_fast
from pbe_fast.models import build_model

SHAPE = (3, 16, 16)
pytestmark = pytest.mark.skipif(not is_fast(), reason="no AVX512-BF16 here, or no native build")


class Odd(nn.Module):
    """Normalisations that a ReLU follows in all the ways in which it may not, or may, become part of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b, self.c, self.twice, self.loose = (nn.BatchNorm2d(16) for _ in range(5))
        self.plain = nn.BatchNorm2d(16, affine=False, momentum=0.3)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = self.a(x)
        x = F.relu(a) + a  # its output is used twice
        x = self.relu(self.b(x))
        x = self.c(x).relu_() + x
        x = torch.relu(self.twice(self.twice(x)))
        x = self.drop(self.plain(x)) * self.loose.weight.view(-1, 1, 1)
        x = F.gelu(self.loose(x))
        return self.head(x.mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "preact_resnet18": lambda: build_model("preact_resnet18", num_classes=10, width=16),
    "resnet18": lambda: build_model("resnet18", num_classes=10),
    "small_cnn": lambda: build_model("small_cnn", num_classes=10, width=16),
    "odd": Odd,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(memory_format=torch.channels_last).train()


def placed(form: nn.Module) -> list[NormInTraining]:
    return [module for module in form.modules() if isinstance(module, NormInTraining)]


def passes(model: nn.Module, form: nn.Module) -> list[Tensor]:
    """Logits and gradients of three passes, and what the buffers came to."""
    seen: list[Tensor] = []
    for number in range(3):
        images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(number))
        torch.manual_seed(number)
        logits = form(images.contiguous(memory_format=torch.channels_last))
        seen += [logits.detach(), *torch.autograd.grad(logits.square().sum(), [*model.parameters()])]
    return [*seen, *(buffer.float() for buffer in model.buffers())]


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_statistics_are_those_of_the_model(name: str) -> None:
    model = made(name)
    twin = copy.deepcopy(model)
    form = training_form(twin, SHAPE)
    assert form is not twin
    assert {id(p) for p in form.parameters()} <= {id(p) for p in twin.parameters()}
    for expected, got in zip(passes(model, model), passes(twin, form), strict=True):
        # Rounding, and the few ReLUs that it flips. Before a normalisation a bias has no gradient but rounding.
        assert (got - expected).norm() <= 0.01 * expected.norm() + 1e-4


def test_what_is_replaced() -> None:
    assert [norm.relu for norm in placed(training_form(made("preact_resnet18"), SHAPE))] == 16 * [True]
    # Of a residual block's two, the second comes before the sum.
    assert sum(norm.relu for norm in placed(training_form(made("resnet18"), SHAPE))) == 9
    odd = made("odd")
    form = training_form(odd, SHAPE)
    names = {name: module.relu for name, module in form.named_modules() if isinstance(module, NormInTraining)}
    # Not "twice", which is called twice.
    assert names == {"a": False, "b": True, "c": True, "plain": False, "loose": False}
    assert type(odd.get_submodule("b")) is nn.BatchNorm2d


class Sometimes(nn.Module):
    """A layer that is left out at times, by Python's dice, by NumPy's or by PyTorch's."""

    def __init__(self, dice: Callable[[], float]) -> None:
        super().__init__()
        self.dice = dice
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.dice() < 0.5:
            x = F.relu(self.norm(x))
        return self.head(x.mean((2, 3)))


class Frozen(nn.Module):
    """Keeps its normalisation in eval mode, whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Beside(nn.Module):
    """Does something beside calling modules and functions between a convolution and a normalisation."""

    def __init__(self, between: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.between(self.conv, x))).mean((2, 3)))


def without_gradient(conv: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return conv(x)


def in_float32(conv: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return conv(x)


class Counting(Beside):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (2.0 if self.calls > 100 else 1.0)


def without_momentum() -> nn.Module:
    model = made("small_cnn")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a mean over all batches
    return model


def hooked() -> nn.Module:
    model = made("small_cnn")
    next(iter(model.children())).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sometimes(random.random),
        lambda: Sometimes(lambda: float(torch.rand(()))),
        Frozen,
        without_momentum,
        hooked,
        lambda: Beside(lambda conv, x: Rounded.apply(conv(x))),
        lambda: Beside(without_gradient),
        lambda: Beside(in_float32),
        lambda: Beside(lambda conv, x: checkpoint(conv, x, use_reentrant=True)),
        lambda: Counting(lambda conv, x: conv(x)),
        lambda: made("small_cnn").double(),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 10)),
    ],
    ids=[
        "random",
        "torch",
        "frozen",
        "momentum",
        "hook",
        "own gradient",
        "no gradient",
        "no autocast",
        "checkpoint",
        "counter",
        "float64",
        "nothing",
    ],
)
def test_what_cannot_be_followed_trains_as_it_is(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert training_form(model, SHAPE) is model


def test_a_plain_model_of_that_kind_is_followed() -> None:
    model = Beside(lambda conv, x: conv(x))
    assert training_form(model, SHAPE) is not model


def test_other_images_go_the_usual_way() -> None:
    form = training_form(made("small_cnn"), SHAPE)
    norm = placed(form)[0]
    expected = copy.deepcopy(norm)
    images = torch.randn(4, norm.num_features, 5, 5).half()
    torch.testing.assert_close(norm(images), F.relu(nn.BatchNorm2d.forward(expected, images)))


def test_the_fine_tuner_trains_the_model_by_it() -> None:
    images = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageSet(images, torch.arange(64) % 10, tuple("0123456789"))
    models = [made("preact_resnet18") for _ in range(2)]
    # A hook, and so not by it.
    models[1].register_forward_hook(lambda *_: None)
    losses = []
    for model in models:
        config = FineTuneConfig(lr=0.01, batch_size=16, augment="none")
        tuner = FineTuner(model, config, total_steps=4, generator=torch.Generator().manual_seed(0))
        losses.append(tuner.run(data, steps=4))
        assert (tuner._form is model) == (model is models[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(("name", "passing"), [("preact_resnet18", 5), ("resnet18", 0), ("odd", 1)])
def test_both_gradients_of_a_residual_block_are_one(name: str, passing: int) -> None:
    form = training_form(made(name), SHAPE)
    norms = [module for module in form.modules() if isinstance(module, NormInTraining)]
    assert sum(norm.passes_on for norm in norms) == passing


@pytest.mark.usefixtures("two_threads")
def test_small_images_lie_side_by_side_where_amx_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    images = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    for amx in (False, True):
        monkeypatch.setattr(training, "has_amx", lambda amx=amx: amx)
        model = made("preact_resnet18")
        form = training_form(model, SHAPE)
        assert sum(isinstance(module, ConvInTraining) for module in form.modules()) == (20 if amx else 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            logits = form(images.contiguous(memory_format=torch.channels_last))
        logits.float().square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*reversed(grads), strict=True):
        assert ours is not None and theirs is not None and ours.dtype == torch.float32
        # Sums in another order, of products of the same bfloat16 numbers.
        assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm()) + 1e-6


class InPlace(nn.Module):
    """Changes what a convolution of large filters returns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.deep = nn.Conv2d(3, 256, 3, 2, 1), nn.BatchNorm2d(256), nn.Conv2d(256, 256, 3, 1, 1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.deep(self.norm(self.stem(x)))).mean((2, 3)))


@pytest.mark.usefixtures("two_threads")
def test_outputs_of_images_side_by_side_may_be_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for amx in (True, False):
        monkeypatch.setattr(training, "has_amx", lambda amx=amx: amx)
        torch.manual_seed(0)
        model = InPlace().to(memory_format=torch.channels_last).train()
        form = training_form(model, SHAPE)
        assert any(isinstance(module, ConvInTraining) for module in form.modules()) == amx
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            form(torch.rand(64, *SHAPE)).float().square().mean().backward()
        grads.append(model.deep.weight.grad)
    ours, theirs = grads
    assert ours is not None and theirs is not None
    assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm())
