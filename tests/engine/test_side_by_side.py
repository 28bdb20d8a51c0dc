from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.engine.side_by_side import Geometry, conv2d, has_large_filters, row_of

pytestmark = pytest.mark.usefixtures("two_threads")
SAME = Geometry((1, 1), (1, 1), (1, 1), 1)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(4, 70),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kernels=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
)
def test_images_come_back_and_outputs_are_those_of_each_alone(
    batch: int,
    sizes: tuple[int, int],
    kernels: tuple[int, int],
    strides: tuple[int, int],
    dilation: int,
) -> None:
    padding = (dilation * (kernels[0] - 1) // 2, dilation * (kernels[1] - 1) // 2)
    geometry = Geometry(strides, padding, (dilation, dilation), 1)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, *sizes, generator=generator).double()
    weight = torch.randn(6, 4, *kernels, generator=generator).double()
    row = row_of(x.shape, geometry, kernels)
    assert row is not None
    wide = row.lay(x)
    assert (wide.shape[0], wide.shape[3]) == row.wide
    again = row.take(wide)
    assert torch.equal(again, x) and again.is_contiguous(memory_format=torch.channels_last) and not again._is_view()
    exact = F.conv2d(x, weight, None, *geometry)
    torch.testing.assert_close(row.take_outputs(F.conv2d(wide, weight, None, *geometry)), exact)
    assert torch.equal(row.take_outputs(row.lay_outputs(exact)), exact)


@pytest.mark.parametrize("channels", [16, 256])
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (2, 1))])
def test_all_gradients(channels: int, stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    geometry = Geometry(stride, dilation, dilation, 1)
    generator = torch.Generator().manual_seed(0)
    sizes = (37, channels, 6, 5), (channels, channels, 3, 3), (channels,)
    inputs = [(torch.randn(s, generator=generator) / 8).bfloat16().requires_grad_() for s in sizes]
    assert has_large_filters(inputs[1]) == (channels == 256)
    row = row_of(sizes[0], geometry, (3, 3))
    assert row is not None
    x, weight, bias = inputs
    got = conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, geometry, row)
    wide = [i.detach().double().requires_grad_() for i in inputs]
    exact = F.conv2d(*wide, *geometry)
    grad = torch.randn(exact.shape, generator=generator).bfloat16()
    pairs: list[tuple[Tensor, Tensor]] = [(got, exact)]
    ours, theirs = torch.autograd.grad(got, inputs, grad), torch.autograd.grad(exact, wide, grad.double())
    pairs += zip(ours, theirs, strict=True)
    for own, expected in pairs:
        assert own.dtype == torch.bfloat16
        assert float((own.double() - expected).norm() / expected.norm()) < 2.0**-8


def test_a_frozen_weight_gets_no_gradient() -> None:
    x = torch.randn(8, 16, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    row = row_of(x.shape, SAME, (3, 3))
    assert row is not None
    weight = torch.randn(16, 16, 3, 3, dtype=torch.bfloat16)
    conv2d(x, weight, None, SAME, row).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_where_it_helps_nothing() -> None:
    assert row_of((64, 16, 8, 8), SAME, (3, 3)) is not None
    assert row_of((64, 16, 8, 9), SAME, (3, 3)) is None
    assert row_of((3, 16, 8, 8), SAME, (3, 3)) is None
    assert row_of((64, 16, 8, 8), Geometry((1, 1), (0, 0), (1, 1), 1), (3, 3)) is None
    assert row_of((64, 16, 8, 8), Geometry((1, 1), (2, 2), (2, 2), 16), (3, 3)) is None


@pytest.mark.parametrize(("batch", "together"), [(4, 2), (5, 3), (32, 16), (33, 9), (48, 12), (64, 16), (128, 16)])
def test_threads_share_the_wide_images_evenly(batch: int, together: int) -> None:
    row = row_of((batch, 16, 4, 4), SAME, (3, 3))
    assert row is not None and row.together == together
    assert row.wide[0] % 2 == 0
