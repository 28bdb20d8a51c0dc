from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.cosine_rank import cosine_distance, cosine_scores, rank, select_top
from pbe_fast.kernels.cosine_rank.tolerances import TOLERANCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
# Zero rows and infinities are meant to meet a division or a product here; the interpreter's numpy says so each time.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
BACKENDS = tuple(
    pytest.param(
        name, marks=pytest.mark.skipif(bool(backends.missing("cosine_rank", name)), reason=f"no {name} backend here")
    )
    for name in backends.BACKENDS
)
SELECTING = BACKENDS[:2]


@pytest.fixture(autouse=True)
def outputs_full_of_nan() -> Iterator[None]:
    """Whatever an operation allocates and does not write shows as NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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


def logits(rows: int, classes: int, *, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Pairs of rows from nearly parallel (1e-4 apart) to unrelated, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, classes, generator=generator)
    apart = 10 ** torch.empty(rows, 1).uniform_(-4, 0.5, generator=generator)
    b = a + apart * torch.randn(rows, classes, generator=generator)
    lengths = 10 ** torch.empty(2, rows, 1).uniform_(-spread, spread, generator=generator)
    return a * lengths[0], b * lengths[1]


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


@pytest.mark.parametrize("backend", SELECTING)
@pytest.mark.parametrize("kind", ("distinct", "ties", "equal", "nonfinite", "descending"))
@pytest.mark.parametrize("rows", (1, 63, 1000, 40_000))
def test_selection_is_the_front_of_the_ranking(backend: str, kind: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(8)
    distance = torch.rand(rows, generator=generator) * 2
    if kind == "ties":
        distance = (distance * 4).floor() - 2
    elif kind == "equal":
        distance.fill_(0.25)
    elif kind == "descending":
        distance = distance.sort(descending=True).values
    elif kind == "nonfinite":
        for step, value in ((5, NAN), (7, INF), (11, -INF), (13, -0.0), (17, 0.0)):
            distance[::step] = value
    # Python's sort is stable; tuples order by value, then index.
    keys = [(value if abs(value) < INF else INF, index) for index, value in enumerate(distance.tolist())]
    keys = [(INF if value != value else value, index) for value, index in keys]
    order = [index for _, index in sorted(keys)]
    assert rank(distance).indices.tolist() == order
    for n in {0, 1, rows // 3, rows * 7 // 10, rows}:
        assert select_top(distance, n=n, backend=backend).tolist() == sorted(order[:n])


def test_rank_counts_and_cuts() -> None:
    distance = torch.tensor([0.5, NAN, 0.25, INF, 0.25, 1.0])
    assert rank(distance)[1] == 2
    assert rank(distance).indices.tolist() == [2, 4, 0, 5, 1, 3]
    assert rank(distance, n=2).indices.tolist() == [2, 4]
    assert rank(distance, fraction=0.5).indices.tolist() == [2, 4, 0]
    assert select_top(distance, fraction=0.5).tolist() == [0, 2, 4]
    assert select_top(distance, n=5).tolist() == [0, 1, 2, 4, 5]
    assert rank(torch.empty(0)).indices.tolist() == [] and rank(torch.empty(0)).num_nonfinite == 0
    assert cosine_distance(torch.empty(0, 3), torch.empty(0, 3)).shape == (0,)


def test_threads_change_nothing() -> None:
    a, b = logits(20_000, 10, seed=9)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            d = cosine_distance(a, b)
            results.append((d, select_top(d, fraction=0.7)))
    finally:
        torch.set_num_threads(before)
    assert results[0][0].equal(results[1][0]) and results[0][1].equal(results[1][1])
    # Nor does a row's place: blocks and their tails give what the whole gives.
    assert torch.cat([cosine_distance(u, v) for u, v in zip(a.split(777), b.split(777), strict=True)]).equal(d)


def test_operators_are_well_formed() -> None:
    a, b = logits(5, 4, seed=10)
    op = torch.ops.pbe_fast.cosine_distance.default
    for inputs in ((a, b), (a.bfloat16(), b), (torch.randn(4, 5).T, b)):
        torch.library.opcheck(op, inputs)
    torch.library.opcheck(torch.ops.pbe_fast.select_smallest.default, (torch.rand(9), 4))


def test_compiles_into_a_full_graph() -> None:
    def ranked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        distance = cosine_distance(a * 2, b)
        return distance, select_top(distance, n=20)

    a, b = logits(63, 10, seed=11)
    compiled = torch.compile(ranked, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(a, b), ranked(a, b), strict=True):
        assert result.equal(expected)


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"shapes.*\(2, 3\) and \(2, 4\); accepted"),
        (torch.zeros(3), torch.zeros(3), ValueError, "shapes"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, "K >= 1"),
        (torch.zeros(2, 3).double(), torch.zeros(2, 3), TypeError, "float64; accepted: float32"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), TypeError, "logits b; got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, "devices"),
    ],
)
@pytest.mark.parametrize("backend", (None, "reference"))
def test_bad_logits(a: Tensor, b: Tensor, error: type[Exception], message: str, backend: str | None) -> None:
    with pytest.raises(error, match=message):
        cosine_distance(a, b, backend=backend)


@pytest.mark.parametrize(
    "kwargs", [{"n": 4}, {"n": -1}, {"fraction": 1.1}, {"fraction": NAN}, {"n": 1, "fraction": 0.5}]
)
def test_bad_counts(kwargs: dict[str, float]) -> None:
    for function in (rank, select_top):
        with pytest.raises(ValueError, match="accepted"):
            function(torch.rand(3), **kwargs)  # type: ignore[operator]


def test_bad_distances_and_backends() -> None:
    with pytest.raises(ValueError, match="neither n nor fraction"):
        select_top(torch.rand(3))
    with pytest.raises(TypeError, match="float64; accepted: float32"):
        select_top(torch.rand(3).double(), n=1)
    with pytest.raises(ValueError, match=r"\(3, 1\); accepted: \(N,\)"):
        rank(torch.rand(3, 1))
    with pytest.raises(ValueError, match="accepted: 'reference'"):
        select_top(torch.rand(3), n=1, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        cosine_distance(torch.ones(1, 1), torch.ones(1, 1), backend="cuda")
    with pytest.raises(ValueError, match="0 to 3"):
        torch.ops.pbe_fast.select_smallest(torch.rand(3), 4)


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
