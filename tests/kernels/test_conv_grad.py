from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.kernels import backends
from pbe_fast.kernels.conv_grad import Filters, conv2d, conv2d_pair, conv_grad, pack

needs_native = pytest.mark.skipif(
    bool(backends.missing("conv_grad", "native")), reason=str(backends.missing("conv_grad", "native"))
)
BACKENDS = ("reference", pytest.param("native", marks=needs_native))


class Shape(NamedTuple):
    batch: int
    channels: int
    channels_out: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    # Channels out of another convolution of the same images; 0: none.
    beside: int = 0


# What networks have, then odd sizes: channels that fill no register or no pair, all widths of the register blocks, few
# channels, which share registers, a stride above the kernel, taps that reach no pixel, no image at all.
SHAPES = (
    Shape(2, 16, 32, 16, 16, 3, 2, 1, 32),
    Shape(2, 32, 64, 8, 8, 1, 2, 0),
    Shape(3, 3, 16, 32, 32, 3, 1, 1),
    Shape(1, 3, 64, 33, 47, 7, 2, 3),
    Shape(2, 64, 128, 7, 9, 3, 2, 1, 128),
    Shape(1, 1, 1, 1, 1, 1, 1, 0, 1),
    Shape(2, 5, 130, 9, 6, 2, 3, 1),
    Shape(1, 4, 3, 11, 5, 5, 4, 2, 7),
    Shape(2, 17, 2, 1, 20, 1, 5, 0),
    Shape(1, 35, 33, 6, 6, 4, 1, 3),
    Shape(1, 130, 17, 5, 11, 3, 3, 1, 5),
    Shape(0, 16, 16, 4, 4, 3, 2, 1),
)
# Of the root mean square of the result: its own rounding, 2^-8 at most, and half of that where there are many numbers.
TOLERANCE = 0.004


class Case(NamedTuple):
    x: Tensor
    grad: Tensor
    mask: Tensor
    grad_beside: Tensor | None
    filters: Filters
    bias: Tensor

    @property
    def size(self) -> tuple[int, int]:
        return (self.x.shape[2], self.x.shape[3])


def case(shape: Shape, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    batch, channels, channels_out, height, width, kernel, stride, padding, beside = shape
    sides = [(n + 2 * padding - kernel) // stride + 1 for n in (height, width)]

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).bfloat16()

    weight = normal(channels_out, channels, kernel, kernel) / (kernel * channels**0.5)
    other = normal(beside, channels, 1, 1) / channels**0.5 if beside else None
    return Case(
        normal(batch, channels, height, width),
        normal(batch, channels_out, *sides),
        normal(batch, channels_out, *sides),
        normal(batch, beside, *sides) if beside else None,
        pack(weight, stride=stride, padding=padding, beside=other),
        torch.randn(channels_out, generator=g),
    )


def exact(a: Case, mask: Tensor | None = None) -> Tensor:
    weight, _, stride, padding, beside = a.filters
    grad = a.grad.double() if mask is None else a.grad.double() * (mask > 0)
    out = torch.nn.grad.conv2d_input(a.x.shape, weight.double(), grad, stride, padding)
    if beside is not None:
        assert a.grad_beside is not None
        out = out + torch.nn.grad.conv2d_input(a.x.shape, beside.double(), a.grad_beside.double(), stride)
    return out


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of the expected value's, or of one where that is smaller."""
    assert got.shape == expected.shape
    assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=torch.channels_last)
    if expected.numel() == 0:
        return 0.0
    scale = expected.square().mean().sqrt().clamp_min(1.0)
    return float((got.double() - expected).square().mean().sqrt() / scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_gradient(backend: str, masked: bool, shape: Shape) -> None:
    a = case(shape)
    mask = a.mask if masked else None
    got = conv_grad(a.grad, a.filters, a.size, mask=mask, grad_beside=a.grad_beside, backend=backend)
    assert error(got, exact(a, mask)) < TOLERANCE


@needs_native
@settings(max_examples=200, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 70, 70, 19, 19, 7, 4))),
    padding=st.integers(0, 6),
    beside=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 3),
)
def test_random_shapes(sizes: tuple[int, ...], padding: int, beside: int, seed: int, threads: int) -> None:
    batch, channels, channels_out, height, width, kernel, stride = sizes
    padding = min(padding, kernel - 1)
    kernel = min(kernel, height + 2 * padding, width + 2 * padding)
    padding = min(padding, kernel - 1)
    beside = beside if kernel == 2 * padding + 1 else 0
    a = case(Shape(batch, channels, channels_out, height, width, kernel, stride, padding, beside), seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = conv_grad(a.grad, a.filters, a.size, mask=a.mask, grad_beside=a.grad_beside)
    finally:
        torch.set_num_threads(before)
    assert error(got, exact(a, a.mask)) < TOLERANCE


@needs_native
@pytest.mark.parametrize("shape", [Shape(2, 3, 64, 224, 224, 7, 2, 3), Shape(1, 64, 128, 112, 112, 3, 2, 1, 128)])
def test_large_images_take_many_blocks(shape: Shape) -> None:
    a = case(shape)
    assert error(conv_grad(a.grad, a.filters, a.size, grad_beside=a.grad_beside), exact(a)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
def test_convolutions_have_it(relu: bool, shape: Shape) -> None:
    a = case(shape)
    x, weight, beside = a.x.requires_grad_(), a.filters.weight, a.filters.beside
    if beside is None:
        outputs = (conv2d(x, a.filters, a.bias, relu=relu),)
    else:
        outputs = conv2d_pair(x, a.filters, a.bias, None, relu=relu)
        assert torch.equal(outputs[1], F.conv2d(x, beside, None, a.filters.stride))
    plain = F.conv2d(x, weight, a.bias.bfloat16(), *a.filters[2:4])
    assert torch.equal(outputs[0], plain.relu() if relu else plain)
    grads = [grad for grad in (a.grad, a.grad_beside) if grad is not None]
    (got,) = torch.autograd.grad(outputs, x, grads)
    # By the outputs' own signs: near zero, rounding decides.
    assert error(got, exact(a, outputs[0].detach() if relu else None)) < TOLERANCE


def test_an_output_that_is_not_used_has_no_gradient() -> None:
    a = case(SHAPES[0])
    x = a.x.requires_grad_()
    both = conv2d_pair(x, a.filters, None, None)
    (got,) = torch.autograd.grad(both[0], x, a.grad)
    alone = pack(a.filters.weight, stride=2, padding=1)
    assert torch.equal(got, conv_grad(a.grad, alone, a.size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_its_taps_are(backend: str) -> None:
    a = case(SHAPES[0])
    a.grad[0, 0, 4, 4] = float("nan")
    got = conv_grad(a.grad, a.filters, a.size, grad_beside=a.grad_beside, backend=backend)
    assert torch.equal(got.isnan(), exact(a).isnan()) and got.isnan().any()


@needs_native
@pytest.mark.parametrize("shape", [Shape(1, 3, 16, 32, 32, 3, 1, 1), Shape(1, 16, 5, 16, 16, 3, 2, 1)])
def test_nan_goes_no_further_than_a_register(shape: Shape) -> None:
    a = case(shape)
    a.grad[0, -1, 4, 4] = float("nan")
    got, expected = conv_grad(a.grad, a.filters, a.size).isnan(), exact(a).isnan()
    assert got[expected].all()
    # Rows are never mixed, and a register holds 16 // C neighbours.
    most = 1 + max(1, 16 // shape.channels)
    columns = F.max_pool1d(expected.any(1).any(1).float(), 2 * most * shape.stride + 1, 1, most * shape.stride) > 0
    assert not (got.any(1) & ~(expected.any(1).any(2)[..., None] & columns[:, None])).any()


def test_opcheck_and_compile() -> None:
    for shape in (SHAPES[0], SHAPES[2]):
        a = case(shape)
        weight, packed, stride, padding, beside = a.filters
        rest = (weight, packed, *a.size, stride, padding, a.grad_beside, beside)
        torch.library.opcheck(torch.ops.pbe_fast.conv_grad, (a.grad, a.mask, *rest))

    a = case(SHAPES[2])

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(conv2d(x, a.filters, a.bias, relu=True).sum(), x)[0]

    compiled = torch.compile(lambda x: conv2d(x, a.filters, a.bias, relu=True) * 2, backend="aot_eager", fullgraph=True)
    x = a.x.requires_grad_()
    out = compiled(x)
    assert torch.equal(out, conv2d(x, a.filters, a.bias, relu=True) * 2)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], 2 * gradient(x))


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"grad": torch.zeros(2, 32, 8, 8)}, TypeError, "grad; got torch.float32"),
        ({"grad": torch.zeros(2, 32, 8, 9).bfloat16()}, ValueError, "grad; got"),
        ({"size": (18, 16)}, ValueError, "grad; got"),
        ({"size": (0, 16)}, ValueError, "height and width"),
        ({"mask": torch.zeros(1, 32, 8, 8).bfloat16()}, ValueError, "mask"),
        ({"grad_beside": None}, ValueError, "grad_beside"),
        ({"filters": case(SHAPES[4]).filters}, ValueError, "grad; got"),
        ({"backend": "triton"}, RuntimeError, "no Triton version"),
    ],
)
def test_refuses(change: dict[str, Any], kind: type[Exception], match: str) -> None:
    a = case(SHAPES[0])
    arguments: dict[str, Any] = {
        "grad": a.grad, "filters": a.filters, "size": a.size, "grad_beside": a.grad_beside, **change
    }  # fmt: skip
    with pytest.raises(kind, match=match):
        conv_grad(**arguments)


def test_refuses_filters_that_do_not_fit() -> None:
    a = case(SHAPES[0])
    with pytest.raises(ValueError, match="of two convolution"):
        conv2d(a.x, a.filters)
    with pytest.raises(ValueError, match="of one convolution"):
        conv2d_pair(a.x, case(SHAPES[1]).filters, None, None)
    with pytest.raises(ValueError, match="x; got shape"):
        conv2d(a.x[0], pack(a.filters.weight, stride=2, padding=1))
    with pytest.raises(ValueError, match="packed"):
        conv_grad(a.grad, a.filters._replace(packed=a.filters.packed[1:]), a.size, grad_beside=a.grad_beside)
    with pytest.raises(ValueError, match="weight"):
        pack(torch.zeros(4, 4, 5, 3))
    with pytest.raises(ValueError, match="stride and padding"):
        pack(torch.zeros(4, 4, 3, 3), padding=3)
    with pytest.raises(ValueError, match="beside"):
        pack(torch.zeros(4, 4, 3, 3), padding=1, beside=torch.zeros(4, 5, 1, 1))
    with pytest.raises(ValueError, match="padding"):
        pack(torch.zeros(4, 4, 3, 3), beside=torch.zeros(4, 4, 1, 1))
