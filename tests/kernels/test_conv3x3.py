from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.kernels import backends
from pbe_fast.kernels.affine_relu import affine_relu, affine_relu_and, reference, relu_backward
from pbe_fast.kernels.conv3x3 import conv3x3, conv3x3_and, pack

needs_native = pytest.mark.skipif(
    bool(backends.missing("conv3x3", "native")), reason=str(backends.missing("conv3x3", "native"))
)
# (B, C, K, H, W): odd sizes, channels that fill no group of 16, all widths of the register blocks, no image at all.
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 16, 16, 8, 8),
    (3, 24, 40, 7, 9),
    (1, 130, 17, 6, 6),
    (2, 48, 32, 1, 63),
    (2, 3, 64, 33, 47),
    (1, 64, 128, 5, 1),
    (0, 16, 16, 4, 4),
)
# Of the root mean square of the result: the tiles' rounding to bfloat16, 2^-9 each, through sums of 16.
TOLERANCE = 0.012


def case(shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    batch, channels, channels_out, height, width = shape
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, channels, height, width, generator=g).bfloat16(),
        "weight": torch.randn(channels_out, channels, 3, 3, generator=g) / (3 * channels**0.5),
        "bias": torch.randn(channels_out, generator=g),
        "residual": torch.randn(batch, channels_out, height, width, generator=g).bfloat16(),
        "mask": torch.randn(batch, channels, height, width, generator=g).bfloat16(),
        "grad": torch.randn(batch, channels_out, height, width, generator=g).bfloat16(),
    }


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of the expected value's, or of one where that is smaller."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.square().mean().sqrt().clamp_min(1.0)
    return float((got.double() - expected).square().mean().sqrt() / scale)


def exact(a: dict[str, Tensor], relu: bool = False, residual: bool = False, mask: bool = False) -> Tensor:
    x = a["x"].double() * (a["mask"] > 0) if mask else a["x"].double()
    y = F.conv2d(x, a["weight"].double(), a["bias"].double(), padding=1)
    y = y + a["residual"].double() if residual else y
    return y.relu() if relu else y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_it_is_the_convolution(backend: str, shape: tuple[int, ...]) -> None:
    for options in range(8):
        relu, residual, mask = bool(options & 1), bool(options & 2), bool(options & 4)
        a = case(shape, options)
        y = conv3x3(
            a["x"],
            pack(a["weight"], backend=backend),
            a["bias"],
            residual=a["residual"] if residual else None,
            relu=relu,
            mask=a["mask"] if mask else None,
            backend=backend,
        )
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact(a, relu, residual, mask)) < TOLERANCE


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
def test_native_agrees_with_the_reference(shape: tuple[int, ...]) -> None:
    a = case(shape)
    packed = [pack(a["weight"], backend=backend) for backend in ("reference", "native")]
    for ours, expected in zip(packed[1][:2], packed[0][:2], strict=True):
        # One rounding of the same sums, in another order.
        torch.testing.assert_close(ours.float(), expected.float(), rtol=2.0**-7, atol=1e-6)
    y, expected = (conv3x3(a["x"], packed[0], a["bias"], backend=backend) for backend in ("native", "reference"))
    torch.testing.assert_close(y.float(), expected.float(), rtol=2.0**-7, atol=2e-2)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 70, 70, 19, 19))),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 3),
)
def test_random_shapes_in_both_directions(shape: tuple[int, ...], seed: int, threads: int) -> None:
    a = case(shape, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = pack(a["weight"])
        x = a["x"].requires_grad_()
        y = conv3x3(x, packed, a["bias"])
        (grad_x,) = torch.autograd.grad(y, x, a["grad"])
    finally:
        torch.set_num_threads(before)
    grad = a["grad"].double()
    # A sum over few numbers may come out near zero: the error is measured against what was summed up.
    assert error(y, exact(a)) < 2 * TOLERANCE
    expected_x = torch.nn.grad.conv2d_input(x.shape, a["weight"].double(), grad, padding=1)
    assert error(grad_x, expected_x) < 2 * TOLERANCE


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients(relu: bool, residual: bool) -> None:
    a = case((2, 16, 32, 6, 5))
    leaves = [a["x"].requires_grad_()] + ([a["residual"].requires_grad_()] if residual else [])
    y = conv3x3(a["x"], pack(a["weight"]), a["bias"], residual=a["residual"] if residual else None, relu=relu)
    got = torch.autograd.grad(y, leaves, a["grad"])
    # By the outputs' own signs: near zero, rounding decides.
    grad = a["grad"].double() * (y.detach() > 0) if relu else a["grad"].double()
    expected = [torch.nn.grad.conv2d_input(a["x"].shape, a["weight"].double(), grad, padding=1)]
    expected += [grad] if residual else []
    for ours, exactly in zip(got, expected, strict=True):
        assert error(ours, exactly) < TOLERANCE


def not_numbers(shape: tuple[int, ...]) -> Tensor:
    """NaN with either sign, which are positive and negative as integers."""
    bits = torch.tensor([0x7FC0, 0xFFC0 - 2**16], dtype=torch.int16)
    return bits.repeat(torch.Size(shape).numel() // 2).view(torch.bfloat16).view(shape)


@needs_native
def test_not_a_number_is_not_above_zero() -> None:
    a = case((1, 16, 16, 4, 4))
    masked = conv3x3(a["x"], pack(a["weight"]), mask=not_numbers((1, 16, 4, 4)), backend="native")
    assert masked.count_nonzero() == 0
    scale = torch.ones(16)
    arguments = a["x"], not_numbers((1, 16, 4, 4)), scale, None
    torch.testing.assert_close(
        torch.ops.pbe_fast.affine_relu_backward(*arguments), reference.affine_relu_backward(*arguments), rtol=0, atol=0
    )


def test_no_second_derivative_of_affine_relu() -> None:
    x = torch.ones(1, 16, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    y = affine_relu(x, torch.ones(16), torch.zeros(16))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_second_derivative_through_a_mask() -> None:
    a = case((1, 16, 16, 4, 4))
    y = conv3x3(a["x"].requires_grad_(), pack(a["weight"]), mask=a["mask"])
    with pytest.raises(RuntimeError, match="mask"):
        y.sum().backward()


def test_the_operators_pass_opcheck_and_compile() -> None:
    a = case((2, 16, 32, 6, 6))
    packed = pack(a["weight"])
    arguments = (a["x"].requires_grad_(), None, *packed[:2], a["bias"], a["residual"].requires_grad_(), True, 32)
    torch.library.opcheck(torch.ops.pbe_fast.conv3x3, arguments)
    torch.library.opcheck(torch.ops.pbe_fast.conv3x3_pack, (a["weight"], True))
    scale = torch.rand(16)
    torch.library.opcheck(torch.ops.pbe_fast.affine_relu, (a["x"], scale, scale))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 17, 3, 5), (2, 3, 1, 1), (0, 4, 2, 2), (1, 1, 63, 1)])
def test_affine_relu(backend: str, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).bfloat16()
    scale, shift = torch.randn(2, shape[1], generator=g)
    y = affine_relu(x, scale, shift, backend=backend)
    expected = (x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)).relu()
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-8, atol=1e-6)
    (grad,) = torch.autograd.grad(affine_relu(x.requires_grad_(), scale, shift), x, y)
    expected = (y.double() * scale.double().view(-1, 1, 1)).where(y > 0, 0.0)
    torch.testing.assert_close(grad.double(), expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 17, 3, 5), (2, 3, 1, 1), (0, 4, 2, 2)])
def test_what_affine_relu_passes_on_brings_its_gradient(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, grad, beside = torch.randn(3, *shape, generator=g).bfloat16()
    scale, shift = torch.randn(2, shape[1], generator=g)
    y, same = affine_relu_and(x.requires_grad_(), scale, shift)
    assert torch.equal(same, x) and torch.equal(y, affine_relu(x, scale, shift))
    (got,) = torch.autograd.grad((y, same), x, (grad, beside))
    exact = (grad.double() * scale.double().view(-1, 1, 1)).where(y > 0, 0.0) + beside.double()
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
def test_what_a_convolution_passes_on_brings_its_gradient(relu: bool) -> None:
    a = case((2, 16, 32, 6, 6))
    x, packed = a["x"].requires_grad_(), pack(a["weight"])
    out, same = conv3x3_and(x, packed, a["bias"], relu=relu)
    assert torch.equal(same, x) and torch.equal(out, conv3x3(x, packed, a["bias"], relu=relu))
    grad, beside = (torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).bfloat16() for t in (out, x))
    (got,) = torch.autograd.grad((out, same), x, (grad, beside))
    (alone,) = torch.autograd.grad(conv3x3(x, packed, a["bias"], relu=relu), x, grad)
    assert error(got, alone.double() + beside.double()) < 2.0**-7


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 33, 3, 5), (0, 4, 2, 2)])
def test_the_gradient_of_a_relu(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    grad, y, beside = torch.randn(3, *shape, generator=g).bfloat16()
    masked = grad.where(y > 0, 0.0)
    assert torch.equal(relu_backward(grad, y), masked)
    both = torch.ops.pbe_fast.affine_relu_backward(grad, y, None, beside)
    assert torch.equal(both, (masked.float() + beside.float()).bfloat16())
    with pytest.raises(ValueError, match="beside; got"):
        torch.ops.pbe_fast.affine_relu_backward(grad, y, None, torch.zeros(1, 2, 3, 4).bfloat16())


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"x": torch.zeros(2, 16, 6, 6)}, TypeError, "x; got torch.float32"),
        ({"x": torch.zeros(16, 6, 6).bfloat16()}, ValueError, "x; got shape"),
        ({"x": torch.zeros(2, 16, 6, 0).bfloat16()}, ValueError, "x; got shape .*at least 1 x 1"),
        ({"x": torch.zeros(2, 16, 0, 6).bfloat16()}, ValueError, "x; got shape .*at least 1 x 1"),
        ({"x": torch.zeros(2, 64, 6, 6).bfloat16()}, ValueError, "packed"),
        ({"bias": torch.zeros(3)}, ValueError, "bias"),
        ({"residual": torch.zeros(2, 32, 6, 7).bfloat16()}, ValueError, "residual"),
        ({"mask": torch.zeros(2, 16, 6, 6)}, TypeError, "mask"),
    ],
)
def test_refuses(change: dict[str, Any], kind: type[Exception], match: str) -> None:
    a = case((2, 16, 32, 6, 6))
    arguments: dict[str, Any] = {"x": a["x"], "packed": pack(a["weight"]), "bias": a["bias"], **change}
    with pytest.raises(kind, match=match):
        conv3x3(**arguments)
    with pytest.raises(ValueError, match="weight"):
        pack(torch.zeros(4, 4, 5, 5))
    with pytest.raises(RuntimeError, match="no Triton version"):
        conv3x3(a["x"], pack(a["weight"]), backend="triton")
