"""Convolutions that a processor gets wrong in bfloat16 are found, and what is done about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pbe_fast
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine import rounding
from pbe_fast.engine.rounding import precision_for, wrong_convolutions
from pbe_fast.errors import PBEWarning

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
FOUND = "a convolution of 8 channels of 8 x 8 with a kernel of 4 x 4 and stride 4 x 4"


def network() -> nn.Module:
    """Its second convolution is of the kind that AMX gets wrong with many images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 4, 4), nn.Flatten(), nn.Linear(64, 4)
    )


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that gets strides of 4 wrong in bfloat16, in the last image of many alone."""
    right = torch.convolution

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: None, stride: list[int], *how: object) -> torch.Tensor:
        out = right(x, weight, bias, stride, *how)  # type: ignore[arg-type]
        if x.dtype == torch.bfloat16 and stride[0] == 4:
            out[-1] = 100 * out[-1]
        return out

    monkeypatch.setattr(torch, "convolution", wrong)
    rounding._is_wrong.cache_clear()
    yield
    rounding._is_wrong.cache_clear()


def test_a_convolution_that_is_wrong_for_some_image_is_found(faulty: None) -> None:
    assert wrong_convolutions(network(), SHAPE) == [FOUND]


@pytest.mark.parametrize("kernel", [(4, 4), (3, 3)])
def test_what_is_found_is_wrong_and_the_rest_is_right(kernel: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn((128, 8, 8, 8), generator=generator).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn((16, 8, *kernel), generator=generator).to(torch.bfloat16, memory_format=torch.channels_last)
    got = F.conv2d(x, weight, stride=kernel)
    expected = F.conv2d(x.float(), weight.float(), stride=kernel)
    wrong = not (got - expected).norm() < 0.05 * expected.norm()
    net = nn.Conv2d(8, 16, kernel, kernel)
    assert bool(wrong_convolutions(net, (8, 8, 8))) == wrong


def test_auto_becomes_float32_and_says_why(faulty: None) -> None:
    with pytest.warns(PBEWarning, match=f"wrong in bfloat16 on this processor, float32 is used: {FOUND}"):
        # Whatever "auto" is on this machine.
        assert _resolved("auto") == torch.float32


def test_what_is_asked_for_is_kept_with_a_warning(faulty: None) -> None:
    with pytest.warns(PBEWarning, match="as bfloat16 was asked for"):
        assert precision_for(network(), SHAPE, device=CPU, requested="bf16") == torch.bfloat16


def test_nothing_is_said_in_float32_or_of_other_models(faulty: None) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    other(torch.zeros(1, *SHAPE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert precision_for(network(), SHAPE, device=CPU, requested="fp32") == torch.float32
        assert precision_for(other, SHAPE, device=CPU, requested="bf16") == torch.bfloat16


def test_many_are_summed_up(faulty: None) -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(3, 3, 4 + k, 4)) for k in (0, 1, 2, 3)))
    with pytest.warns(PBEWarning, match="; and 1 more$"):
        precision_for(net, SHAPE, device=CPU, requested="bf16")


def test_the_model_the_random_numbers_and_the_caches_stay_as_they_are(faulty: None) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.net(x + torch.rand(()))

    model = Draws().train()
    before = torch.random.get_rng_state()
    assert wrong_convolutions(model, SHAPE) == [FOUND]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert int(model.calls) == 0 and model.training and all(p.requires_grad for p in model.parameters())


class Whole(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("where", ["around it", "inside", "twice inside", "in place"])
def test_nothing_is_compiled_for_two_images(faulty: None, where: str) -> None:
    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise AssertionError("compiled")

    model = network()
    if where == "in place":
        # torch never compiles a Sequential itself so.
        model = Whole(model)
        model.compile(backend=compiler)
    elif where == "around it":
        model = torch.compile(model, backend=compiler)
    else:
        part = torch.compile(nn.ReLU(), backend=compiler)
        model = nn.Sequential(part, model, *([part] if where == "twice inside" else []))
    before = list(model.modules())
    assert wrong_convolutions(model, SHAPE) == [FOUND]
    assert list(model.modules()) == before
    with pytest.raises(Exception, match="compiled"):
        model(torch.zeros(2, *SHAPE))


def test_models_in_half_precision_and_of_one_dimension(faulty: None) -> None:
    assert wrong_convolutions(network().bfloat16(), SHAPE) == [FOUND]
    assert wrong_convolutions(nn.Conv1d(3, 4, 4, 4), (3, 16)) == [
        "a convolution of 3 channels of 16 with a kernel of 4 and stride 4"
    ]


def test_purify_goes_on_in_float32(faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "resolve_precision", _bf16)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8, generator=generator)
    clean = ImageSet(images=images, labels=torch.arange(64) % 4, class_names=tuple("abcd"))
    config = PurifyConfig(adversarial_steps=9, clean_steps=2, clean_epochs=1)
    with pytest.warns(PBEWarning, match="float32 is used"):
        result = pbe_fast.purify(network(), clean_data=clean, config=config, progress=False)
    assert result.precision == "float32"


def _resolved(requested: str) -> torch.dtype:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "resolve_precision", _bf16)
        return precision_for(network(), SHAPE, device=CPU, requested=requested)


def _bf16(device: torch.device, requested: str) -> torch.dtype:
    return torch.bfloat16
