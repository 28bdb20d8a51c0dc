from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.engine import onednn
from pbe_fast.engine.frozen_layers import PostOpConv2d, can_have_post_ops
from pbe_fast.engine.onednn import Filters, conv2d, conv2d_and
from pbe_fast.engine.side_by_side import Geometry

pytestmark = [
    pytest.mark.skipif(not onednn.is_usable(), reason="no bfloat16 in oneDNN, or another oneDNN"),
    pytest.mark.usefixtures("two_threads"),
]
# Of one rounding to bfloat16, and sums in another order.
TOLERANCE = 2.0**-8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def distance(got: Tensor, exact: Tensor) -> float:
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def compare(batch: int, sizes: tuple[int, int], channels: tuple[int, int], kernel: int, geometry: Geometry) -> None:
    """Outputs and gradients with and without ReLU and residual against float64."""
    stride, padding, dilation, groups = geometry
    x = drawn(batch, channels[0], *sizes, seed=1)
    fan = channels[0] // groups * kernel**2
    weight = (drawn(channels[1], channels[0] // groups, kernel, kernel, seed=2) / fan**0.5).bfloat16()
    bias = drawn(channels[1], seed=3)
    filters = Filters(weight, geometry)
    for relu in (False, True):
        for residual in (None, "there"):
            if residual and groups > 1:
                continue
            wide = [x.double().requires_grad_()]
            exact = F.conv2d(wide[0], weight.double(), bias.double(), stride, padding, dilation, groups)
            short = [x.clone().requires_grad_()]
            if residual:
                values = drawn(*exact.shape, seed=4)
                wide.append(values.double().requires_grad_())
                short.append(values.clone().requires_grad_())
                exact = exact + wide[1]
            exact = exact.relu() if relu else exact
            got = conv2d(short[0], filters, bias, residual=short[1] if residual else None, relu=relu)
            assert got.dtype == torch.bfloat16 and got.shape == exact.shape
            assert distance(got, exact) < TOLERANCE
            out_grad = drawn(*exact.shape, seed=5)
            # Of an output that rounding took to zero the gradient is none.
            masked = out_grad.double() * ((got > 0) if relu else 1.0)
            expected = torch.autograd.grad(exact, wide, out_grad.double())
            if relu:
                plain = F.conv2d(wide[0], weight.double(), None, stride, padding, dilation, groups)
                expected = (*torch.autograd.grad(plain, wide[:1], masked), *([masked] if residual else []))
            for ours, theirs in zip(torch.autograd.grad(got, short, out_grad), expected, strict=True):
                assert distance(ours, theirs) < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels=st.tuples(st.sampled_from([1, 3, 16, 40]), st.sampled_from([1, 10, 32])),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 2),
)
def test_any_convolution(
    batch: int,
    sizes: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    # Outputs that lie in the padding are not for oneDNN (`can_have_post_ops`).
    padding = min(padding, dilation * (kernel - 1) // 2)
    width = sizes[1] + 2 * padding - dilation * (kernel - 1)
    if sizes[0] + 2 * padding < dilation * (kernel - 1) + 1 or width < 1:
        return
    # A column of outputs it computes wrongly on AMX, also for torch's own operator (pytorch issue 169688).
    if stride > 1 and kernel > 1 and width <= stride:
        return
    compare(batch, sizes, channels, kernel, Geometry((stride, stride), (padding, padding), (dilation, dilation), 1))


def test_groups() -> None:
    compare(3, (9, 7), (16, 32), 3, Geometry((2, 2), (1, 1), (1, 1), 4))


@pytest.mark.parametrize("batch", [1, 3, 37])
@pytest.mark.parametrize(
    ("sizes", "channels", "kernel", "stride", "padding"),
    [
        ((4, 4), (256, 256), 3, 1, 1),
        ((7, 5), (256, 256), 3, 2, 1),
        ((1, 1), (256, 256), 3, 1, 1),
        ((3, 8), (512, 1024), 1, 2, 0),
        ((4, 5), (128, 256), 5, 3, 2),
    ],
)
def test_images_side_by_side(
    batch: int, sizes: tuple[int, int], channels: tuple[int, int], kernel: int, stride: int, padding: int
) -> None:
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), 1)
    weight = torch.zeros(*channels[::-1], kernel, kernel)
    assert (Filters(weight, geometry).row_of((batch, channels[0], *sizes)) is not None) == (batch == 37)
    compare(batch, sizes, channels, kernel, geometry)


def test_small_filters_and_large_images_are_taken_as_they_are() -> None:
    same = Geometry((1, 1), (1, 1), (1, 1), 1)
    images = (64, 256, 4, 4)
    assert Filters(torch.zeros(256, 256, 3, 3), same).row_of(images) is not None
    assert Filters(torch.zeros(64, 256, 3, 3), same).row_of(images) is None
    assert Filters(torch.zeros(256, 256, 3, 3), same).row_of((64, 256, 9, 8)) is None
    shrinking = Geometry((1, 1), (0, 0), (1, 1), 1)
    assert Filters(torch.zeros(256, 256, 3, 3), shrinking).row_of(images) is None


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (256, 1), (256, 2)])
def test_what_is_passed_on_brings_its_gradient(channels: int, stride: int) -> None:
    weight = drawn(channels, channels, 3, 3, seed=1) / (3 * channels**0.5)
    filters = Filters(weight, Geometry((stride, stride), (1, 1), (1, 1), 1))
    x = drawn(9, channels, 6, 6, seed=2).requires_grad_()
    out, same = conv2d_and(x, filters, relu=True)
    assert torch.equal(same, x)
    grads = drawn(*out.shape, seed=3), drawn(*x.shape, seed=4)
    (got,) = torch.autograd.grad((out, same), x, grads)
    (alone,) = torch.autograd.grad(conv2d(x, filters, relu=True), x, grads[0])
    assert distance(got, alone.double() + grads[1].double()) < TOLERANCE


def test_filters_are_put_in_order_anew_for_new_weights_copies_and_pickles() -> None:
    torch.manual_seed(0)
    conv = PostOpConv2d(nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False))
    x = drawn(2, 16, 5, 5)
    with torch.no_grad():
        before = conv(x)
        others = [copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))]
        for other in others:
            assert torch.equal(other(x), before)
            other.weight.neg_()
            other.refresh()
            assert distance(other(x) - conv.bias.view(-1, 1, 1), conv.bias.view(-1, 1, 1) - before) < 0.02
        assert torch.equal(conv(x), before)
        conv.weight.zero_()
        conv.refresh()
        assert torch.equal(conv(x), conv.bias.bfloat16().view(1, -1, 1, 1).expand(2, 16, 5, 5))


def test_many_shapes_keep_few_filters() -> None:
    filters = Filters(torch.zeros(16, 16, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1))
    for size in range(1, 30):
        conv2d(drawn(1, 16, size, size), filters)
    assert len(filters._packed) <= 2 * Filters._KEPT


def test_what_is_no_plain_convolution_is_left_alone() -> None:
    assert can_have_post_ops(nn.Conv2d(3, 4, 3, groups=1, dilation=2, stride=2))
    assert not can_have_post_ops(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    assert not can_have_post_ops(nn.Conv2d(3, 4, 3, padding="same"))
    assert not can_have_post_ops(nn.Conv1d(3, 4, 3))
    # Outputs that lie in the padding.
    assert can_have_post_ops(nn.Conv2d(3, 4, 3, dilation=2, padding=2))
    assert not can_have_post_ops(nn.Conv2d(3, 4, 3, dilation=2, padding=3))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_residual_that_cannot_be_part_of_it(groups: int) -> None:
    """In float32, of one channel for all, or beside a convolution in groups."""
    torch.manual_seed(0)
    conv = PostOpConv2d(nn.Conv2d(16, 16, 3, padding=1, groups=groups).requires_grad_(False))
    conv.relu = True
    x = drawn(2, 16, 5, 5)
    plain = F.conv2d(x.float(), conv.weight, conv.bias, padding=1, groups=groups)
    for residual in (torch.randn(2, 16, 5, 5), drawn(2, 1, 5, 5), drawn(2, 16, 5, 5)):
        assert distance(conv(x, residual), (plain + residual.float()).relu()) < 0.01


@pytest.mark.parametrize("batch", [2, 37])
def test_what_comes_after_may_change_the_outputs_in_place(batch: int) -> None:
    """Also where they lay side by side."""
    torch.manual_seed(0)
    conv = PostOpConv2d(nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False))
    x = drawn(batch, 256, 8, 8).requires_grad_()
    out = F.silu(conv(x), inplace=True)
    out += x
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    wide = x.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(
        (F.silu(F.conv2d(wide, conv.weight.bfloat16().float(), conv.bias, padding=1)) + wide).sum(), wide
    )
    assert distance(grad, exact) < 0.02


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_model_that_has_diverged_shows_it(name: str) -> None:
    conv = PostOpConv2d(nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False))
    conv.relu = True
    getattr(conv, name)[3] = torch.nan
    conv.refresh()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(drawn(2, 16, 5, 5))[:, 3].isnan().all()


def test_in_float32_it_is_the_plain_one() -> None:
    conv = nn.Conv2d(3, 16, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(PostOpConv2d(conv)(x), conv(x))
