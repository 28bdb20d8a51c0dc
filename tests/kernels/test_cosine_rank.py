from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_pairs import logits
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.cosine_rank import cosine_distance, cosine_scores, rank, select_top
from pbe_fast.kernels.cosine_rank.tolerances import TOLERANCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
# Zero rows and infinities are meant to meet a division or a product here; the interpreter's numpy says so each time.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("outputs_full_of_nan"),
]
BACKENDS = tuple(
    pytest.param(
        name, marks=pytest.mark.skipif(bool(backends.missing("cosine_rank", name)), reason=f"no {name} backend here")
    )
    for name in backends.BACKENDS
)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each Triton program more rows: the interpreter needs 25 ms for any, and does not run out of registers."""
    if backends.triton_interpreted():
        from pbe_fast.kernels.cosine_rank import triton_kernel

        monkeypatch.setattr(triton_kernel, "WARP_TILE", 1 << 17)


def distance_on(backend: str, a: Tensor, b: Tensor) -> Tensor:
    """The distances of CPU tensors, wherever the backend computes them."""
    device = device_of(backend)
    return cosine_distance(a.to(device), b.to(device), backend=backend).cpu()


def exact_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos in numpy's longest floats."""
    u, v = (x.double().numpy().astype(np.longdouble) for x in (a, b))
    norm_u, norm_v = (np.sqrt((x * x).sum(1, keepdims=True)) for x in (u, v))
    return torch.from_numpy((0.5 * ((u / norm_u - v / norm_v) ** 2).sum(1)).astype(np.float64))


def assert_exact(result: Tensor, a: Tensor, b: Tensor, backend: str) -> None:
    interpreted = backend == "triton" and backends.triton_interpreted()
    exact = exact_distance(a, b)
    error = (result.double() - exact).abs()
    allowed = TOLERANCES["interpreter" if interpreted else backend].of(exact)
    worst = int((error / allowed).argmax())
    assert (error <= allowed).all(), f"row {worst}: {result[worst]} for {exact[worst]}"
    assert result.dtype == torch.float32 and (result >= 0).all() and (result <= 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (2, 10, 43, 200, 1000))
@pytest.mark.parametrize("rows", (1, 63))
@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_is_exact_within_its_tolerance(backend: str, rows: int, classes: int, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in logits(rows, classes, seed=rows + classes))
    assert_exact(distance_on(backend, a, b), a, b, backend)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (2, 10, 43, 200, 1000))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_rows(backend: str, classes: int, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in logits(1000, classes, seed=classes))
    assert_exact(distance_on(backend, a, b), a, b, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_longer_than_a_tile(backend: str, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in logits(3, 5001, seed=1, spread=0.5))
    assert_exact(distance_on(backend, a, b), a, b, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_dtypes_may_differ(backend: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    for classes in (10, 43):
        a, b = logits(63, classes, seed=2)
        a, b = a.to(pair[0]), b.to(pair[1])
        assert_exact(distance_on(backend, a, b), a, b, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", (1, 2, 3, 10, 43))
def test_layouts_of_rows(backend: str, classes: int) -> None:
    a, b = logits(63, classes, seed=3)
    expected = distance_on(backend, a, b)
    device = device_of(backend)
    apart = torch.full((63, classes + 5), NAN, device=device)[:, 3 : 3 + classes].copy_(a)
    transposed = b.to(device).T.contiguous().T
    assert cosine_distance(apart, transposed, backend=backend).cpu().equal(expected)
    one_row = a[:1].to(device).expand(63, classes)
    repeated = cosine_distance(one_row, one_row.contiguous(), backend=backend)
    assert (repeated <= 1e-12).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", (2, 10, 43, 5001))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_non_finite_rows(backend: str, classes: int, dtype: torch.dtype) -> None:
    a, b = logits(9, classes, seed=4, spread=0.5)
    a[0] = 0
    b[1] = 0
    a[2], b[2] = 0, 0
    a[3, 0], b[4, -1], a[5, 1] = NAN, INF, -INF
    a[6], b[6, 0] = 0, INF
    a[7], b[7] = a[8], a[8]
    a, b = a.to(dtype), b.to(dtype)
    d = distance_on(backend, a, b)
    assert d[:3].tolist() == [1.0, 1.0, 1.0]
    assert d[3:7].isnan().all()
    assert d[7] == 0.0 or (backend == "triton" and d[7] <= 1e-12)
    assert_exact(d[8:], a[8:], b[8:], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("classes", (10, 200, 5001))
def test_neither_overflow_nor_underflow(backend: str, dtype: torch.dtype, classes: int) -> None:
    a, b = (x.to(dtype) for x in logits(6, classes, seed=5, spread=0.0))
    scales = torch.tensor([[1e30, 1e-30], [1e-30, 1e30], [1e37, 1e37], [1e-33, 1.0], [1.0, 1e30], [1e-30, 1e-30]])
    a, b = (a.float() * scales[:, :1]).to(dtype), (b.float() * scales[:, 1:]).to(dtype)
    assert a.isfinite().all() and b.isfinite().all()
    assert_exact(distance_on(backend, a, b), a, b, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_angles(backend: str) -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [1.0, 1.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-2.0, -4.0], [1.0, 0.0]])
    d = distance_on(backend, a, b)
    torch.testing.assert_close(d, torch.tensor([0.0, 1.0, 2.0, 1 - 0.5**0.5]), rtol=1e-6, atol=1e-12)
    scores = cosine_scores(a.to(device_of(backend)), b.to(device_of(backend)), backend=backend).cpu()
    torch.testing.assert_close(scores, F.cosine_similarity(a, b), rtol=0, atol=2e-7)


def test_bf16_logits_keep_their_ranking() -> None:
    """What F.cosine_similarity makes of them: a handful of values, and a ranking by index."""
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(20_000, 200, generator=generator)
    b = a + 0.05 * torch.randn(20_000, 200, generator=generator)
    a, b = a.bfloat16(), b.bfloat16()
    distance = cosine_distance(a, b)
    assert F.cosine_similarity(a, b).unique().numel() < 100
    assert distance.unique().numel() > 19_000
    assert rank(distance, n=100).indices.equal(rank(exact_distance(a, b).float(), n=100).indices)


@pytest.mark.skipif(not backends.triton_interpreted(), reason="the GPU fuses by itself")
def test_triton_with_an_fma_that_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies, rounds and adds. With the GPU's fma the kernel meets the GPU's tolerance."""
    from triton.runtime import interpreter

    def create_fma(self: object, x: object, y: object, z: object) -> object:
        # The product of two float32 numbers is exact in float64.
        with np.errstate(invalid="ignore"):
            fused = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data  # type: ignore[attr-defined]
        return interpreter.TensorHandle(fused.astype(np.float32), z.dtype.scalar)  # type: ignore[attr-defined]

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    for classes in (10, 200, 5001):
        a, b = logits(63 if classes < 5000 else 3, classes, seed=7, spread=0.0)
        b = a + 1e-3 * (b - a)
        exact = exact_distance(a, b)
        error = (cosine_distance(a, b, backend="triton").double() - exact).abs()
        assert (error <= TOLERANCES["triton"].of(exact)).all()


def random_cases(backend: str, dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """The largest |error| / (d + 1e-6) by dtype over 200 random cases."""
    largest = dict.fromkeys(dtypes, 0.0)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(
        dtype=st.sampled_from(dtypes),
        rows=st.integers(1, 9),
        classes=st.integers(1, 80) | st.integers(81, 1100),
        seed=st.integers(0, 2**32),
        spread=st.floats(0, 2),
    )
    def case(dtype: torch.dtype, rows: int, classes: int, seed: int, spread: float) -> None:
        a, b = (x.to(dtype) for x in logits(rows, classes, seed=seed, spread=spread))
        # With few classes a row of float16 may have vanished; zero rows have a test of their own.
        a, b = torch.where(a == 0, 2.0**-10, a), torch.where(b == 0, 2.0**-10, b)
        distance, exact = distance_on(backend, a, b), exact_distance(a, b)
        assert_exact(distance, a, b, backend)
        largest[dtype] = max(largest[dtype], float(((distance - exact).abs() / (exact + 1e-6)).max()))

    case()
    return largest


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases_against_exact_arithmetic(backend: str) -> None:
    # 200 cases of each dtype; on the interpreter 200 of all three.
    groups = [DTYPES] if backend == "triton" and backends.triton_interpreted() else [(dtype,) for dtype in DTYPES]
    for dtypes in groups:
        for dtype, error in random_cases(backend, dtypes).items():
            print(f"{backend} {dtype}: largest error relative to d + 1e-6: {error:.1e}")
            assert 0 < error < (1e-4 if backend == "triton" else 1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_a_cuda_graph(dtype: torch.dtype) -> None:
    a, b = (x.to("cuda", dtype) for x in logits(1000, 43, seed=12))
    cosine_distance(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cosine_distance(a, b)
    a.copy_(a.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert_exact(out.cpu(), a.cpu(), b.cpu(), "triton")


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    a = torch.randn(2_200_000, 1000, device="cuda", dtype=torch.bfloat16)
    d = cosine_distance(a, a.roll(1, 1))
    tail = slice(-50, None)
    assert_exact(d[tail].cpu(), a[tail].cpu(), a.roll(1, 1)[tail].cpu(), "triton")
    assert not d.isnan().any()
    assert select_top(d, n=7).equal(rank(d, n=7).indices.sort().values)
