"""Selection from a ranking, and the operators of cosine_rank: threads, torch.compile, what is refused."""

from __future__ import annotations

import pytest
import torch
from logit_pairs import logits
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.cosine_rank import cosine_distance, rank, select_top

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
SELECTING = BACKENDS[:2]


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
