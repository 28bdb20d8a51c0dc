from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pbe_fast.kernels.cosine_rank import CosineRanker, QRHeads, cosine_distance, rank, select_top


def logits(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, classes, generator=generator)
    return a, a + 0.1 * torch.randn(rows, classes, generator=generator)


@pytest.mark.parametrize("block", (1, 8, 63, 200))
@pytest.mark.parametrize("classes", (3, 10, 43))
def test_blocks_in_any_order_give_what_the_whole_gives(block: int, classes: int) -> None:
    a, b = logits(200, classes, seed=1)
    a[17], b[40] = torch.nan, 0
    ranker = CosineRanker(200)
    starts = list(range(0, 200, block))
    for start in starts[1::2] + starts[::2]:
        ranker.update(a[start : start + block].bfloat16(), b[start : start + block], start)
    whole = cosine_distance(a.bfloat16(), b)
    assert ranker.distances().nan_to_num(9).equal(whole.nan_to_num(9))
    assert ranker.select(fraction=0.7).equal(select_top(whole, fraction=0.7))
    assert ranker.rank(n=30).indices.equal(rank(whole, n=30).indices)
    assert ranker.rank().num_nonfinite == 1 and ranker.rank().indices[-1] == 17


def test_a_later_block_replaces_an_earlier_one() -> None:
    a, b = logits(10, 4, seed=2)
    ranker = CosineRanker(10, device="cpu")
    ranker.update(a, a, 0)
    ranker.update(a[4:6], b[4:6], 4)
    assert ranker.distances().nonzero().flatten().tolist() == [4, 5]
    assert ranker.distances()[4:6].equal(cosine_distance(a[4:6], b[4:6]))


def test_missing_rows_and_blocks_outside_are_refused() -> None:
    a, b = logits(6, 4, seed=3)
    ranker = CosineRanker(10)
    ranker.update(a, b, 0)
    for start in (5, 10, -1):
        with pytest.raises(ValueError, match="within 0 to 10"):
            ranker.update(a, b, start)
    with pytest.raises(RuntimeError, match="got the logits of 6; accepted: all 10"):
        ranker.select(n=2)
    with pytest.raises(ValueError, match="at least 0"):
        CosineRanker(-1)


def heads(classes: int, width1: int, width2: int, rows: int, seed: int) -> tuple[Tensor, ...]:
    """Two heads that differ by a percent, and features that do: the distances are near 0, where precision counts."""
    generator = torch.Generator().manual_seed(seed)
    weight1, bias1 = torch.randn(classes, width1, generator=generator), torch.randn(classes, generator=generator)
    features1 = torch.randn(rows, width1, generator=generator)
    if width1 != width2:
        weight2, features2 = torch.randn(classes, width2, generator=generator), torch.randn(rows, width2)
    else:
        weight2 = weight1 + 0.01 * torch.randn(classes, width2, generator=generator)
        features2 = features1 + 0.01 * torch.randn(rows, width2, generator=generator)
    return weight1, bias1, weight2, bias1 * 0.99, features1, features2


def distance_of_logits(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
    a, b = f1.double() @ w1.double().T + b1.double(), f2.double() @ w2.double().T + b2.double()
    return 0.5 * (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1)


@pytest.mark.parametrize(("classes", "width1", "width2"), [(1000, 16, 16), (50, 4, 7), (34, 16, 16), (10, 16, 16)])
def test_qr_heads_have_the_cosine_of_the_logits(classes: int, width1: int, width2: int) -> None:
    w1, b1, w2, b2, f1, f2 = heads(classes, width1, width2, rows=63, seed=classes)
    qr = QRHeads(w1, b1, w2, b2)
    assert qr.num_columns == min(classes, width1 + width2 + 2)
    exact = distance_of_logits(w1, b1, w2, b2, f1, f2)
    error = (qr.distance(f1, f2).double() - exact).abs()
    # Both logit vectors carry the rounding of a float32 product with the features: 1e-6 of their length at most.
    assert (error <= 1e-6 * exact.sqrt() + 1e-12).all()
    assert qr.distance(f1, f2, backend="reference").sub(qr.distance(f1, f2)).abs().max() <= 1e-6 * exact.max()


def test_qr_heads_without_biases_and_in_half_precision() -> None:
    w1, b1, w2, _, f1, f2 = heads(100, 8, 8, rows=20, seed=5)
    zero = torch.zeros(100)
    exact = distance_of_logits(w1, zero, w2, zero, f1, f2)
    torch.testing.assert_close(QRHeads(w1, None, w2, None).distance(f1, f2).double(), exact, rtol=1e-4, atol=0)
    halves = [x.bfloat16() for x in (w1, b1, w2, b1, f1, f2)]
    result = QRHeads(*halves[:4]).distance(*halves[4:])
    torch.testing.assert_close(result.double(), distance_of_logits(*halves), rtol=1e-4, atol=0)


def test_qr_heads_refuse_what_does_not_fit() -> None:
    w1, b1, w2, b2, f1, f2 = heads(20, 4, 4, rows=3, seed=6)
    with pytest.raises(ValueError, match=r"bias \(19,\); accepted: \(K, D\)"):
        QRHeads(w1, b1[:-1], w2, b2)
    with pytest.raises(ValueError, match=r"accepted: \(K, D1\) and \(K, D2\)"):
        QRHeads(w1, b1, w2[:-1], b2[:-1])
    with pytest.raises(ValueError, match="finite"):
        QRHeads(w1, b1 * torch.inf, w2, b2)
    with pytest.raises(ValueError, match=r"features2; got \(3, 3\); accepted: \(N, 4\)"):
        QRHeads(w1, b1, w2, b2).distance(f1, f2[:, 1:])
