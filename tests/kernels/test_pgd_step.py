from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from devices import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.pgd_step import pgd_step, pgd_step_
from pbe_fast.kernels.tolerances import tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORMS = ("linf", "l2")
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


def case(
    shape: tuple[int, ...],
    *,
    seed: int,
    grad_dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    normalised: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Random images inside of [0, 1] and off the origin, with some pixels at the borders."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator).mul(1.2).sub(0.1).clamp(0, 1)
    adv = (origin + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator) * 10 ** torch.empty(shape[0], 1, 1, 1).uniform_(-3, 3)
    tensors = {"adv": adv, "grad": grad.to(grad_dtype), "origin": origin}
    arguments: dict[str, Any] = {k: v.to(device).contiguous(memory_format=layout) for k, v in tensors.items()}
    if normalised:
        arguments["mean"] = torch.rand(shape[1], generator=generator).to(device)
        arguments["std"] = (torch.rand(shape[1], generator=generator) * 0.5 + 0.1).to(device)
    return arguments


def sizes(norm: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Steps that leave some pixels (or images) inside of the ball and push others out of it."""
    scale = 1.0 if norm == "linf" else math.sqrt(math.prod(shape[1:]))
    return {"norm": norm, "eps": 0.05 * scale, "alpha": 0.02 * scale}


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


def test_gradient_of_another_layout_or_with_gaps() -> None:
    a = case((2, 3, 8, 10), seed=0)
    expected = pgd_step(**a, eps=0.1, alpha=0.03)
    wide = torch.randn(2, 3, 8, 20)
    wide[..., ::2] = a["grad"]
    for grad in (a["grad"].contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        actual = pgd_step(**a | {"grad": grad}, eps=0.1, alpha=0.03)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


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


def test_threads_do_not_change_the_result() -> None:
    a = case((40, 3, 32, 32), seed=0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([pgd_step(**a, **sizes(norm, (40, 3, 32, 32))) for norm in NORMS])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.skipif(bool(backends.missing("pgd_step", "native")), reason="no native backend here")
def test_native_threads_outlive_a_fork_and_serve_several_callers() -> None:
    a = case((64, 3, 32, 32), seed=0)
    expected, _ = pgd_step(**a, eps=0.1, alpha=0.1)
    in_child = {**a, "adv": a["adv"].clone()}
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pgd_step(**a, eps=0.1, alpha=0.1)  # starts the threads that the child will lack
        child = os.fork()
        if child == 0:
            # Nothing of PyTorch's own here: its OpenMP hangs after a fork.
            pgd_step_(**in_child, eps=0.1, alpha=0.1)
            os._exit(0 if np.array_equal(in_child["adv"].numpy(), expected.numpy()) else 1)
        assert os.waitpid(child, 0)[1] == 0
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(lambda _: pgd_step(**a, eps=0.1, alpha=0.1)[0], range(40)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.filterwarnings("error")
def test_the_model_input_may_be_a_leaf_that_collects_gradients() -> None:
    a = case((2, 3, 4, 4), seed=0)
    model_input = torch.empty_like(a["adv"]).requires_grad_()
    pgd_step_(**a, model_input=model_input, eps=0.1, alpha=0.1)
    assert model_input.is_leaf
    model_input.sum().backward()
    assert model_input.grad is not None and torch.equal(model_input.grad, torch.ones_like(a["adv"]))


@pytest.mark.parametrize("written", ["adv", "model_input"])
def test_autograd_hears_of_what_is_overwritten(written: str) -> None:
    a = case((2, 3, 4, 4), seed=0)
    model_input = torch.rand(2, 3, 4, 4)
    factor = torch.ones(1, requires_grad=True)
    product = factor * (a["adv"] if written == "adv" else model_input)
    pgd_step_(**a, model_input=model_input, eps=0.1, alpha=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_arguments_are_left_alone_and_results_carry_no_gradient() -> None:
    a = case((2, 3, 4, 4), seed=0)
    before = {name: value.clone() for name, value in a.items()}
    a["adv"].requires_grad_()
    results = pgd_step(**a, eps=0.1, alpha=0.1)
    assert not any(result.requires_grad for result in results)
    assert all(torch.equal(a[name], before[name]) for name in a)
    assert results[0].data_ptr() != results[1].data_ptr()


def test_in_place_without_a_model_input() -> None:
    a = case((2, 3, 4, 4), seed=0)
    expected, _ = pgd_step(**a, eps=0.1, alpha=0.1)
    adv = a.pop("adv")
    pgd_step_(adv, **a, eps=0.1, alpha=0.1)
    assert torch.equal(adv, expected)


GOOD = case((2, 3, 4, 4), seed=0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"adv": GOOD["adv"][0]}, ValueError, r"adv; got shape \(3, 4, 4\); accepted: \(B, C, H, W\)"),
        ({"adv": GOOD["adv"].double()}, TypeError, "got torch.float64 and torch.float32; accepted: float32"),
        ({"grad": GOOD["grad"].double()}, TypeError, "grad and model input; got torch.float64"),
        ({"out_dtype": torch.int8}, TypeError, "torch.int8; accepted: "),
        ({"grad": GOOD["grad"][:1]}, ValueError, r"grad \(1, 3, 4, 4\)"),
        ({"origin": GOOD["origin"][..., :2]}, ValueError, r"origin \(2, 3, 4, 2\)"),
        ({"origin": GOOD["origin"].contiguous(memory_format=torch.channels_last)}, ValueError, "layout"),
        ({"adv": GOOD["adv"].transpose(2, 3)}, ValueError, "layout"),
        ({"norm": "l1"}, ValueError, "norm; got 'l1'; accepted: "),
        ({"eps": -0.1}, ValueError, "eps and alpha; got -0.1"),
        ({"alpha": math.nan}, ValueError, "eps and alpha; got 0.1 and nan"),
        ({"mean": None}, ValueError, "mean and std; got one of them"),
        ({"std": torch.ones(4)}, ValueError, r"std; got torch.float32 \(4,\); accepted: contiguous float32 \(3,\)"),
        ({"mean": torch.ones(3).half()}, ValueError, "mean; got torch.float16"),
        ({"std": torch.ones(3, device="meta")}, ValueError, "devices"),
        ({"backend": "openmp"}, ValueError, "backend of an operation; got 'openmp'"),
    ],
)
def test_bad_arguments_say_what_is_accepted(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        pgd_step(**{**GOOD, "eps": 0.1, "alpha": 0.1, **change})


def test_bad_model_input() -> None:
    a = dict(GOOD)
    adv = a.pop("adv").clone()
    before = adv.clone()
    for wrong in (torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        with pytest.raises(ValueError, match=r"model_input; got .* accepted: shape, layout and device of adv"):
            pgd_step_(adv, model_input=wrong, **a, eps=0.1, alpha=0.1)
    with pytest.raises(ValueError, match="memory of its own"):
        pgd_step_(adv, model_input=adv, **a, eps=0.1, alpha=0.1)
    assert torch.equal(adv, before)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str, normalised: bool) -> None:
    a = case((2, 3, 8, 8), seed=0, grad_dtype=torch.bfloat16, layout=torch.channels_last, normalised=normalised)
    tensors, affine = (a["adv"], a["grad"], a["origin"]), (a.get("mean"), a.get("std"))
    ops = torch.ops.pbe_fast
    torch.library.opcheck(ops.pgd_step.default, (*tensors, 0.1, 0.03, norm, *affine, torch.bfloat16))
    for model_input in (None, torch.empty_like(a["adv"], dtype=torch.float16)):
        torch.library.opcheck(ops.pgd_step_.default, (*tensors, model_input, 0.1, 0.03, norm, *affine))


def test_compiles_without_a_graph_break() -> None:
    a = case((2, 3, 8, 8), seed=0)

    def two_steps(adv: Tensor, grad: Tensor, origin: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        keywords = {"eps": 0.1, "alpha": 0.03, "mean": mean, "std": std}
        adv, model_input = pgd_step(adv, grad, origin, out_dtype=torch.bfloat16, **keywords)
        pgd_step_(adv, model_input, origin, model_input.clone(), **keywords)
        return adv, model_input

    expected = two_steps(**a)
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(**a)
    for got, wanted in zip(compiled, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_cuda_graph_replays_steps(norm: str) -> None:
    a = case((8, 3, 224, 224), seed=0, device="cuda")
    adv, step = a.pop("adv"), sizes(norm, (8, 3, 224, 224))
    expected = adv.clone()
    for _ in range(3):
        expected, expected_input = pgd_step(expected, **a, **step, out_dtype=torch.bfloat16)
    model_input = torch.empty_like(adv, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Triton compiles at the first launch, which must not be captured
        pgd_step_(adv.clone(), model_input=model_input, **a, **step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = adv.clone()
    with torch.cuda.graph(graph):
        pgd_step_(static, model_input=model_input, **a, **step)
    static.copy_(adv)
    for _ in range(3):
        graph.replay()
    assert torch.equal(static, expected) and torch.equal(model_input, expected_input)
