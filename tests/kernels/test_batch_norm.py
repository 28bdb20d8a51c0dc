from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.kernels import backends
from pbe_fast.kernels.batch_norm import batch_norm, batch_norm_and
from pbe_fast.kernels.tolerances import tolerance

needs_native = pytest.mark.skipif(
    bool(backends.missing("batch_norm", "native")), reason=str(backends.missing("batch_norm", "native"))
)
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
DTYPES = [torch.float32, torch.bfloat16]
# (B, C, H, W): fewer and more channels than a register has, pixels of no whole block, many blocks, two values in all.
SHAPES = [(2, 1, 1, 1), (3, 5, 7, 3), (2, 16, 8, 8), (1, 130, 33, 47), (63, 17, 1, 9), (5, 48, 16, 16)]


def case(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]
    return {
        "x": (torch.randn(shape, generator=g) * 2 + torch.randn(channels, 1, 1, generator=g)).to(dtype),
        "weight": torch.randn(channels, generator=g),
        "bias": torch.randn(channels, generator=g),
        "grad": torch.randn(shape, generator=g).to(dtype),
    }


def gradients(a: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    leaves = [a[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
    y = batch_norm(*leaves, **options)[0]
    return torch.autograd.grad(y, leaves, a["grad"])


def exact(a: dict[str, Tensor], relu: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """PyTorch's own, in float64: the result and the three gradients."""
    leaves = [a[name].double().requires_grad_() for name in ("x", "weight", "bias")]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
    y = y.relu() if relu else y
    return y.detach(), torch.autograd.grad(y, leaves, a["grad"].double())


def error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of the expected value's."""
    assert got.shape == expected.shape
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_batch_normalisation(backend: str, relu: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a = case(shape, dtype)
    y, mean, variance = batch_norm(a["x"], a["weight"], a["bias"], relu=relu, backend=backend)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, exact(a, relu)[0]) < (1e-5 if dtype == torch.float32 else 2.0**-8)
    wide = a["x"].double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)


# What native sums over many pixels and blocks; from two values the gradient is nothing but rounding.
@needs_native
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_gradients(relu: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a = case(shape, dtype, 1)
    for got, expected in zip(gradients(a, relu=relu), exact(a, relu)[1], strict=True):
        assert error(got, expected) < (1e-5 if got.dtype == torch.float32 else 2.0**-8)


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (9, 70, 20, 20))).filter(lambda s: s[0] * s[2] * s[3] > 2),
    dtype=st.sampled_from(DTYPES),
    relu=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_native_is_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, affine: bool, seed: int
) -> None:
    a = case(shape, dtype, seed)
    weights = (a["weight"], a["bias"]) if affine else (None, None)
    ys = [batch_norm(a["x"], *weights, relu=relu, backend=backend) for backend in ("native", "reference")]
    for got, expected in zip(*ys, strict=True):
        # Of few values the deviation can be small, which multiplies float32's rounding.
        torch.testing.assert_close(got, expected, rtol=tolerance(got.dtype)["rtol"] + 2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_variance_about_a_large_mean_is_kept(backend: str) -> None:
    x = torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(0)) + 4096.0
    variance = batch_norm(x, backend=backend)[2]
    # Sums of squares in float32 would be off by 4096^2 / 2^24, as much as the variance itself.
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_not_hidden_by_the_relu(backend: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    x[0, 1, 2, 2] = torch.nan
    y = batch_norm(x, relu=True, backend=backend)[0]
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


@needs_native
def test_threads_and_layout_change_nothing() -> None:
    a = case((9, 33, 31, 29), torch.bfloat16, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(a, relu=True)
        torch.set_num_threads(3)
        together = gradients({**a, "x": a["x"].contiguous(memory_format=torch.channels_last)}, relu=True)
    finally:
        torch.set_num_threads(before)
    for one, three in zip(alone, together, strict=True):
        assert torch.equal(one, three)


def test_a_gradient_is_computed_for_what_asks_for_one() -> None:
    a = case((2, 4, 3, 3), torch.float32)
    weight = a["weight"].requires_grad_()
    y, mean, variance = batch_norm(a["x"], weight, a["bias"])
    assert y.requires_grad and not mean.requires_grad and not variance.requires_grad
    (grad,) = torch.autograd.grad(y, weight, a["grad"].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck() -> None:
    a = case((2, 5, 4, 3), torch.float32)
    for weights in ((a["weight"].requires_grad_(), a["bias"].requires_grad_()), (None, None)):
        torch.library.opcheck(torch.ops.pbe_fast.batch_norm, (a["x"].requires_grad_(), *weights, 1e-5, True))


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"x": torch.zeros(2, 4, 3, 3).half()}, TypeError, "x; got torch.float16"),
        ({"x": torch.zeros(2, 4, 3)}, ValueError, "x; got shape"),
        ({"x": torch.zeros(1, 4, 1, 1)}, ValueError, "two values per channel"),
        ({"x": torch.zeros(0, 4, 3, 3)}, ValueError, "two values per channel"),
        ({"weight": torch.zeros(3)}, ValueError, "weight; got"),
        ({"bias": torch.zeros(4).double()}, ValueError, "bias; got torch.float64"),
    ],
)
def test_refuses(change: dict[str, Tensor], kind: type[Exception], match: str) -> None:
    arguments = {"x": torch.zeros(2, 4, 3, 3), "weight": torch.ones(4), "bias": torch.zeros(4), **change}
    with pytest.raises(kind, match=match):
        batch_norm(**arguments)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no Triton version"):
        batch_norm(torch.zeros(2, 4, 3, 3), backend="triton")


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_what_is_passed_on_brings_its_gradient(relu: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a = case(shape, dtype, 3)
    x, weight, bias = (a[name].requires_grad_() for name in ("x", "weight", "bias"))
    y, mean, variance, same = batch_norm_and(x, weight, bias, eps=1e-5, relu=relu)
    assert torch.equal(same, x) and not mean.requires_grad and not variance.requires_grad
    beside = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = torch.autograd.grad((y, same), (x, weight, bias), (a["grad"], beside))
    alone = torch.autograd.grad(batch_norm(x, weight, bias, relu=relu)[0], (x, weight, bias), a["grad"])
    # Rounded once in place of twice.
    assert error(got[0], alone[0].double() + beside.double()) < (1e-5 if dtype == torch.float32 else 2.0**-7)
    for ours, theirs in zip(got[1:], alone[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_passed_on_without_gradients() -> None:
    x = torch.randn(2, 4, 3, 3)
    y, _, _, same = batch_norm_and(x, None, None, eps=1e-5, relu=True)
    assert same is x and torch.equal(y, batch_norm(x, relu=True)[0])


def test_a_gradient_beside_of_another_shape() -> None:
    x, channels = torch.randn(2, 4, 3, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"beside; got torch.float32 \(2, 4, 3, 4\)"):
        torch.ops.pbe_fast.batch_norm_backward(
            x, torch.zeros(2, 4, 3, 4), x, None, None, channels, channels, 1e-5, True
        )
