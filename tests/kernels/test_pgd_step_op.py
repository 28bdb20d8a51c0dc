"""The operator around a step of PGD: arguments, layouts, threads, autograd, torch.compile, CUDA graphs."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import NORMS, case, sizes
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.pgd_step import pgd_step, pgd_step_


def test_gradient_of_another_layout_or_with_gaps() -> None:
    a = case((2, 3, 8, 10), seed=0)
    expected = pgd_step(**a, eps=0.1, alpha=0.03)
    wide = torch.randn(2, 3, 8, 20)
    wide[..., ::2] = a["grad"]
    for grad in (a["grad"].contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        actual = pgd_step(**a | {"grad": grad}, eps=0.1, alpha=0.03)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


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
