from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from devices import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import NORMS, case, sizes
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.pgd_step import pgd_step, pgd_step_
from pbe_fast.kernels.tolerances import tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FAST = tuple(
    pytest.param(
        name, marks=pytest.mark.skipif(bool(backends.missing("pgd_step", name)), reason=f"no {name} backend here")
    )
    for name in ("native", "triton")
)
SHAPES = ((1, 1, 1, 1), (2, 3, 1, 1), (2, 1, 7, 9), (1, 10, 20, 5), (2, 3, 32, 32), (1, 3, 33, 47), (1, 2050, 1, 2))
# Gradient dtype, input dtype, channels_last, normalised: every pair of values of two columns is there.
VARIANTS = (
    (torch.float32, torch.float32, False, True),
    (torch.float32, torch.float16, True, False),
    (torch.float32, torch.bfloat16, True, True),
    (torch.float16, torch.float32, True, False),
    (torch.float16, torch.float16, False, True),
    (torch.float16, torch.bfloat16, False, False),
    (torch.bfloat16, torch.float32, True, True),
    (torch.bfloat16, torch.float16, True, True),
    (torch.bfloat16, torch.bfloat16, False, False),
)


def exact(a: dict[str, Any], norm: str, eps: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The formula once more, in float64 and independent of the reference: image by image, without broadcasting."""
    adv_next, model_input = [], []
    for x, g, x0 in zip(a["adv"].double(), a["grad"].double(), a["origin"].double(), strict=True):
        if norm == "linf":
            moved = x + alpha * g.sign()
            moved = torch.minimum(torch.maximum(moved, x0 - eps), x0 + eps)
        else:
            if "std" in a:
                g = torch.stack([g[c] / a["std"][c].double() for c in range(len(g))])
            moved = x + alpha * g / g.square().sum().sqrt()
            distance = (moved - x0).square().sum().sqrt().item()
            moved = x0 + (moved - x0) * min(1.0, eps / distance)
        moved = moved.clamp(0, 1)
        adv_next.append(moved)
        if "std" in a:
            moved = torch.stack([(moved[c] - a["mean"][c].double()) / a["std"][c].double() for c in range(len(moved))])
        model_input.append(moved)
    return torch.stack(adv_next), torch.stack(model_input)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape: tuple[int, ...], norm: str) -> None:
    a = case(shape, seed=1)
    adv_next, model_input = pgd_step(**a, **sizes(norm, shape), backend="reference")
    expected, expected_input = exact(a, **sizes(norm, shape))
    torch.testing.assert_close(adv_next, expected.float(), **tolerance(torch.float32))
    torch.testing.assert_close(model_input, expected_input.float(), **tolerance(torch.float32))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", FAST)
def test_fast_versions_agree_with_the_reference(backend: str, shape: tuple[int, ...], norm: str) -> None:
    # The interpreter takes 10 ms a block, so each of its shapes gets another third of the variants.
    variants = VARIANTS if backend == "native" else VARIANTS[SHAPES.index(shape) % 3 :: 3]
    for seed, (grad_dtype, out_dtype, channels_last, normalised) in enumerate(variants):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        device = device_of(backend)
        a = case(shape, seed=seed, grad_dtype=grad_dtype, layout=layout, normalised=normalised, device=device)
        expected, expected_input = pgd_step(**a, **sizes(norm, shape), out_dtype=out_dtype, backend="reference")
        adv_next, model_input = pgd_step(**a, **sizes(norm, shape), out_dtype=out_dtype, backend=backend)
        torch.testing.assert_close(adv_next, expected, **tolerance(torch.float32))
        torch.testing.assert_close(model_input, expected_input, **tolerance(out_dtype))
        assert model_input.dtype == out_dtype
        assert adv_next.stride() == model_input.stride() == a["adv"].stride()

        adv, written = a.pop("adv").clone(), torch.full_like(model_input, math.nan)
        pgd_step_(adv, model_input=written, **a, **sizes(norm, shape), backend=backend)
        torch.testing.assert_close(adv, adv_next, rtol=0, atol=0)
        torch.testing.assert_close(written, model_input, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", FAST)
def test_large_images_agree(backend: str, norm: str) -> None:
    a = case((1, 3, 224, 224), seed=3, grad_dtype=torch.bfloat16, device=device_of(backend))
    expected = pgd_step(**a, **sizes(norm, (1, 3, 224, 224)), out_dtype=torch.bfloat16, backend="reference")
    actual = pgd_step(**a, **sizes(norm, (1, 3, 224, 224)), out_dtype=torch.bfloat16, backend=backend)
    torch.testing.assert_close(actual[0], expected[0], **tolerance(torch.float32))
    torch.testing.assert_close(actual[1], expected[1], **tolerance(torch.bfloat16))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 2**31),
    norm=st.sampled_from(NORMS),
    grad_dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    normalised=st.booleans(),
    relative_alpha=st.floats(0, 3),
)
def test_dispatched_version_against_float64(
    shape: tuple[int, ...],
    seed: int,
    norm: str,
    grad_dtype: torch.dtype,
    out_dtype: torch.dtype,
    channels_last: bool,
    normalised: bool,
    relative_alpha: float,
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a = case(shape, seed=seed, grad_dtype=grad_dtype, layout=layout, normalised=normalised)
    step = sizes(norm, shape)
    step["alpha"] = step["eps"] * relative_alpha
    adv_next, model_input = pgd_step(**a, **step, out_dtype=out_dtype)
    expected, expected_input = exact(a, **step)
    torch.testing.assert_close(adv_next.double(), expected, **tolerance(torch.float32))
    torch.testing.assert_close(model_input.double(), expected_input, **tolerance(out_dtype))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_gradients_that_are_not_numbers(backend: str) -> None:
    a = case((4, 3, 5, 5), seed=0, device=device_of(backend))
    a["adv"] = a["origin"].clone()
    a["grad"][0, 0, 0, 0] = math.nan
    a["grad"][1, 1, 1, 1] = math.inf
    a["grad"][2] = 0
    moved = (pgd_step(**a, eps=1.0, alpha=0.25, backend=backend)[0] - a["origin"]).abs()
    assert moved[0, 0, 0, 0] == 0 and moved[0].count_nonzero() > 60  # a NaN holds its own pixel only
    assert moved[1, 1, 1, 1] > 0
    assert moved[2].count_nonzero() == 0

    moved = (pgd_step(**a, eps=1.0, alpha=0.25, norm="l2", backend=backend)[0] - a["origin"]).abs()
    assert moved[:3].count_nonzero() == 0  # the norm is NaN, infinite, zero: no step
    assert moved[3].count_nonzero() > 60


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_l2_step_has_its_length_however_small_or_large_the_gradient(backend: str, scale: float) -> None:
    a = case((2, 3, 8, 8), seed=0, normalised=False, device=device_of(backend))
    a["adv"] = a["origin"] = torch.full_like(a["origin"], 0.5)
    a["grad"] = a["grad"] / a["grad"].flatten(1).norm(dim=1).view(-1, 1, 1, 1) * scale
    adv_next, _ = pgd_step(**a, eps=1.0, alpha=0.25, norm="l2", backend=backend)
    lengths = (adv_next - 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths.cpu(), torch.full((2,), 0.25), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_steps_of_no_length_and_balls_of_no_radius(backend: str, norm: str) -> None:
    a = case((2, 3, 6, 6), seed=0, device=device_of(backend))
    at_origin, _ = pgd_step(**a, eps=0.0, alpha=0.1, norm=norm, backend=backend)
    torch.testing.assert_close(at_origin, a["origin"], rtol=0, atol=0)
    inside = case((2, 3, 6, 6), seed=0, device=device_of(backend))
    unmoved, _ = pgd_step(**inside, eps=100.0, alpha=0.0, norm=norm, backend=backend)
    torch.testing.assert_close(unmoved, inside["adv"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", FAST)
def test_images_that_are_not_numbers_stay_so(backend: str, norm: str) -> None:
    a = case((3, 1, 4, 4), seed=0, device=device_of(backend))
    a["adv"][0, 0, 1, 1] = math.nan
    a["origin"][1, 0, 2, 2] = math.nan
    expected = pgd_step(**a, **sizes(norm, (3, 1, 4, 4)), backend="reference")
    actual = pgd_step(**a, **sizes(norm, (3, 1, 4, 4)), backend=backend)
    assert expected[0].isnan().sum((1, 2, 3)).tolist() == [1, 1, 0]
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance(torch.float32), equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_images(backend: str) -> None:
    empty = torch.empty(0, 3, 4, 4, device=device_of(backend))
    for norm in NORMS:
        adv_next, model_input = pgd_step(empty, empty, empty, eps=0.1, alpha=0.1, norm=norm, backend=backend)
        assert adv_next.shape == model_input.shape == (0, 3, 4, 4)


def test_l2_gradient_at_the_normalised_input_gives_the_step_in_pixels() -> None:
    torch.manual_seed(0)
    a = case((4, 3, 6, 6), seed=0)
    weights = torch.randn(3 * 36)

    def loss(model_input: Tensor) -> Tensor:
        return (model_input.flatten(1) @ weights).square().sum()

    pixels = a["adv"].clone().requires_grad_()
    normalised = (pixels - a["mean"].view(1, 3, 1, 1)) / a["std"].view(1, 3, 1, 1)
    at_input, at_pixels = torch.autograd.grad(loss(normalised), (normalised, pixels))
    step = {"eps": 2.0, "alpha": 0.5, "norm": "l2"}
    through_input, _ = pgd_step(**a | {"grad": at_input}, **step)
    through_pixels, _ = pgd_step(a["adv"], at_pixels, a["origin"], **step)
    torch.testing.assert_close(through_input, through_pixels, **tolerance(torch.float32))
