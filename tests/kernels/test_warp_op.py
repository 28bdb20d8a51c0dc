"""The operator around the warp: arguments, layouts, threads, torch.compile, CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.warp import WarpPlan, control_field, warp, warp_grid

GRID = warp_grid(control_field(4, seed=0), 8, 10)
PLAN = WarpPlan.of(GRID)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IDS = torch.tensor([3, 2**40])


def images(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return drawn if dtype == torch.uint8 else (drawn / 255).to(dtype)


def test_results_have_the_dtype_asked_for_and_carry_no_gradient() -> None:
    for dtype in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        assert warp(images(2, 3, 8, 10, dtype=dtype), PLAN).dtype == dtype
    assert warp(images(2, 3, 8, 10), PLAN, mean=MEAN, std=STD).dtype == torch.float32
    plain = warp(images(2, 3, 8, 10), PLAN, out_dtype=torch.float32)
    torch.testing.assert_close(plain, warp(images(2, 3, 8, 10, dtype=torch.float32), PLAN), rtol=0, atol=3e-7)
    assert not warp(images(2, 3, 8, 10, dtype=torch.float32).requires_grad_(), PLAN).requires_grad


def test_arguments_are_left_alone() -> None:
    source = images(2, 3, 8, 10)
    before = source.clone(), PLAN.grid.clone(), PLAN.offsets.clone(), PLAN.weights.clone(), IDS.clone()
    warp(source, PLAN, noise=1.0, image_ids=IDS, mean=MEAN, std=STD)
    warp(source, PLAN)
    for now, then in zip((source, PLAN.grid, PLAN.offsets, PLAN.weights, IDS), before, strict=True):
        assert torch.equal(now, then)


def test_a_plan_and_its_grid_give_the_same() -> None:
    source = images(2, 3, 8, 10)
    assert torch.equal(warp(source, GRID), warp(source, PLAN))
    noise = {"noise": 0.5, "image_ids": IDS, "seed": 4}
    assert torch.equal(warp(source, GRID, **noise), warp(source, PLAN, **noise))


def test_layouts_strides_and_normalisation_as_tensors() -> None:
    source = images(2, 3, 8, 10)
    expected = warp(source, PLAN, mean=MEAN, std=STD)
    wide = images(2, 3, 8, 20)
    wide[..., ::2] = source
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for other in (source.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(warp(other, PLAN, mean=mean, std=std), expected)
    transposed = WarpPlan(GRID, PLAN.offsets, PLAN.weights.t().contiguous().t())
    assert torch.equal(warp(source, transposed, mean=MEAN, std=STD), expected)


@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if not backends.missing("warp", name)])
def test_no_images(backend: str) -> None:
    device = "cuda" if backend == "triton" and not backends.triton_interpreted() else "cpu"
    for shape in ((0, 3, 8, 10), (2, 0, 8, 10)):
        empty = torch.empty(shape, device=device)
        assert warp(empty, PLAN.to(device), backend=backend).shape == shape
        ids = torch.arange(shape[0], device=device)
        assert warp(empty, PLAN.to(device), noise=1.0, image_ids=ids, backend=backend).shape == shape


def test_threads_do_not_change_the_result() -> None:
    many, one = images(40, 3, 32, 32), images(1, 3, 150, 150)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = []
            for source in (many, one):
                plan = WarpPlan.of(warp_grid(control_field(4, seed=0), *source.shape[2:]))
                ids = torch.arange(len(source))
                outputs += [warp(source, plan), warp(source, plan, noise=1.0, image_ids=ids, out_dtype=torch.float32)]
            results.append(outputs)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


GOOD: dict[str, Any] = {"images": images(2, 3, 8, 10), "grid": PLAN}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"images": GOOD["images"][0]}, ValueError, r"images; got shape \(3, 8, 10\); accepted: \(B, C, H, W\)"),
        ({"images": GOOD["images"].double()}, TypeError, "got torch.float64 and torch.float64; accepted: "),
        ({"out_dtype": torch.int8}, TypeError, "torch.int8; accepted: "),
        (
            {"images": GOOD["images"] / 255, "out_dtype": torch.uint8},
            TypeError,
            "out_dtype; got uint8 for float images",
        ),
        ({"out_dtype": torch.uint8, "mean": MEAN, "std": STD}, TypeError, "out_dtype; got uint8"),
        (
            {"images": images(2, 3, 10, 8), "noise": 1.0, "image_ids": IDS},
            ValueError,
            r"grid for images \(2, 3, 10, 8\)",
        ),
        (
            {"images": images(2, 3, 9, 10)},
            ValueError,
            r"offsets for images .* got torch.int32 \(80,\) .* accepted: .*\(90,\)",
        ),
        ({"images": images(2, 3, 0, 10)}, ValueError, "accepted: at least 1 x 1"),
        ({"grid": torch.full_like(GRID, math.nan)}, ValueError, "grid; got NaN"),
        ({"grid": GRID[..., :1]}, ValueError, r"grid; got shape \(8, 10, 1\); accepted: \(H, W, 2\)"),
        ({"mean": MEAN}, ValueError, "mean and std; got one of them"),
        ({"mean": MEAN[:2], "std": STD}, ValueError, r"mean for images .* got torch.float32 \(2,\)"),
        ({"mean": MEAN, "std": (0.1, 0.0, 0.1)}, ValueError, "std; got .*; accepted: finite and positive"),
        ({"mean": (0.1, math.nan, 0.1), "std": STD}, ValueError, "mean; got .*; accepted: finite"),
        ({"mean": torch.zeros(3).half(), "std": torch.ones(3)}, ValueError, "mean for images .* got torch.float16"),
        ({"mean": torch.zeros(3, device="meta"), "std": torch.ones(3)}, ValueError, "on meta; accepted: .* on cpu"),
        ({"noise": 1.0}, ValueError, "image_ids; got None with noise"),
        ({"noise": 1.0, "image_ids": IDS[:1]}, ValueError, r"image_ids for images .* got torch.int64 \(1,\)"),
        ({"noise": 1.0, "image_ids": IDS.int()}, ValueError, "image_ids for images .* got torch.int32"),
        ({"noise": math.nan, "image_ids": IDS}, ValueError, "noise; got nan"),
        ({"noise": 1.0, "image_ids": IDS, "seed": -1}, ValueError, r"seed; got -1; accepted: 0 to 2\^63 - 1"),
        ({"backend": "openmp"}, ValueError, "backend of an operation; got 'openmp'"),
    ],
)
def test_bad_arguments_say_what_is_accepted(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        warp(**{**GOOD, **change})


@pytest.mark.skipif(bool(backends.missing("warp", "native")), reason="no native backend here")
@pytest.mark.parametrize("offset", [-1, 80 - 1 - 10, 2**31 - 1])
def test_offsets_outside_of_the_plane_are_refused_not_read(offset: int) -> None:
    offsets = PLAN.offsets.clone()
    offsets[40] = offset
    with pytest.raises(ValueError, match="offsets; got some outside of the plane"):
        torch.ops.pbe_fast.warp(GOOD["images"], offsets, PLAN.weights, None, None, torch.uint8)


@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if not backends.missing("warp", name)])
def test_a_grid_that_was_not_checked_reads_nothing_outside(backend: str) -> None:
    # Under torch.compile the values are not looked at: NaN reads as -1, as in F.grid_sample; the noise lets it pass.
    device = "cuda" if backend == "triton" and not backends.triton_interpreted() else "cpu"
    grid = GRID.clone()
    grid[2, 3], grid[4, 5, 0], grid[6, 7, 1] = math.nan, math.inf, -math.inf
    unchecked = WarpPlan(grid.to(device), PLAN.offsets.to(device), PLAN.weights.to(device))
    source = images(2, 3, 8, 10).to(device)
    noise = {"noise": 1.0, "image_ids": IDS.to(device), "seed": 1}
    result = warp(source, unchecked, **noise, backend=backend)
    assert torch.equal(result, warp(source, unchecked, **noise, backend="reference"))
    assert torch.equal(result[..., 2, 3], source[..., 0, 0])


def test_opcheck() -> None:
    ops, affine = torch.ops.pbe_fast, (torch.tensor(MEAN), torch.tensor(STD))
    source = images(2, 3, 8, 10).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.warp.default, (source, PLAN.offsets, PLAN.weights, *affine, torch.bfloat16))
    torch.library.opcheck(ops.warp.default, (images(2, 3, 8, 10), PLAN.offsets, PLAN.weights, None, None, torch.uint8))
    torch.library.opcheck(ops.warp_noise.default, (source, GRID, 0.125, IDS, 7, *affine, torch.float16))


def test_compiles_without_a_graph_break() -> None:
    def augment(source: Tensor, grid: Tensor, ids: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = warp(source, PLAN, mean=mean, std=std, out_dtype=torch.bfloat16)
        planned = warp(source, grid)
        return shared, planned, warp(source, grid, noise=1.0, image_ids=ids, mean=MEAN, std=STD)

    arguments = (images(2, 3, 8, 10), GRID, IDS, torch.tensor(MEAN), torch.tensor(STD))
    expected = augment(*arguments)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")(*arguments)
    for got, wanted in zip(compiled, expected, strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype


@pytest.mark.gpu
def test_cuda_graph_replays() -> None:
    source, plan, ids = images(2, 3, 8, 10).cuda(), PLAN.to("cuda"), IDS.cuda()
    mean, std = torch.tensor(MEAN, device="cuda"), torch.tensor(STD, device="cuda")

    def both() -> tuple[Tensor, Tensor]:
        keywords = {"mean": mean, "std": std, "out_dtype": torch.bfloat16}
        return warp(source, plan, **keywords), warp(source, plan, noise=1.0, image_ids=ids, **keywords)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # Triton compiles at the first launch, which must not be captured
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    source.copy_(images(2, 3, 8, 10, seed=1))
    ids.add_(1)
    graph.replay()
    for got, wanted in zip(captured, both(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_gpu_and_cpu_give_the_same_bits() -> None:
    source = images(4, 3, 8, 10)
    ids = torch.arange(4)
    for keywords in ({}, {"noise": 1.0, "image_ids": ids, "seed": 9}, {"mean": MEAN, "std": STD}):
        on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in keywords.items()}
        assert torch.equal(warp(source.cuda(), PLAN.to("cuda"), **on_gpu).cpu(), warp(source, PLAN, **keywords))
