"""Ranking training images by how much the model's logits turned (Eq. 9 of Progressive Backdoor Erasing).

The score of an image is the cosine of two logit vectors, the infected and the purified model's. Ranked by is the
distance d = 1 - cos = 1/2 |a/|a| - b/|b||^2 in [0, 2], which keeps its digits where the cosine is close to 1: the
smaller, the likelier is a clean image. Formula, edge cases and tolerances: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels.backends import DTYPE_CODE, LIB, native_op, require, triton_installed
from pbe_fast.kernels.cosine_rank import reference

__all__ = [
    "CosineRanker",
    "QRHeads",
    "RankResult",
    "cosine_distance",
    "cosine_scores",
    "rank",
    "select_top",
]

_OP = "cosine_rank"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class RankResult(NamedTuple):
    """What `rank` returns.

    Attributes:
        indices: (n,) int64, in rank order: ascending distance, ties by ascending index, non-finite distances last.
        num_nonfinite: How many of all N distances are NaN or infinite.
    """

    indices: Tensor
    num_nonfinite: int


def cosine_distance(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """1 - cos of each row of ``a`` with the same row of ``b``, with full relative precision near 0.

    Rows with the same direction have distance 0, orthogonal ones 1, opposite ones 2. Where either row is zero the
    cosine is 0 and the distance 1, also where both are. Where either holds a NaN or an infinity the distance is NaN.
    Neither 1e30 nor 1e-30 overflows or underflows. No gradient passes through.

    Args:
        a: (N, K) logits, float32, float16 or bfloat16; rows may lie apart in memory.
        b: (N, K) logits on the same device; the dtype may differ from that of ``a``.
        backend: "reference", "native" or "triton"; by default the dispatcher takes the device's own.

    Returns:
        (N,) float32 in [0, 2] or NaN.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes that differ or are not (N, K), K = 0, different devices, or a backend for another device.
        RuntimeError: The backend asked for is not there on this machine.
    """
    if backend is None:
        distance: Tensor = torch.ops.pbe_fast.cosine_distance.default(a.detach(), b.detach())
        return distance
    require(_OP, backend, a)
    _check_pair(a, b)
    return {"reference": reference.cosine_distance, "native": _native_distance, "triton": _triton_distance}[backend](
        a.detach(), b.detach()
    )


def cosine_scores(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Eq. 9: the cosine of each row of ``a`` with the same row of ``b``, for display; rank by `cosine_distance`.

    Args:
        a: (N, K) logits, as for `cosine_distance`.
        b: (N, K) logits, as for `cosine_distance`.
        backend: As for `cosine_distance`.

    Returns:
        (N,) float32 in [-1, 1] or NaN: 1 - distance, which near 1 has steps of 6e-8 only.
    """
    return 1.0 - cosine_distance(a, b, backend=backend)


def rank(distance: Tensor, *, n: int | None = None, fraction: float | None = None) -> RankResult:
    """Orders all rows by distance; the first n of them, or a fraction, if one is given.

    Args:
        distance: (N,) float32.
        n: How many indices to return, at most N.
        fraction: The same as a fraction of N in [0, 1], rounded to the nearest count.

    Returns:
        The indices in rank order, and how many distances are not finite (those rank last, by index).

    Raises:
        TypeError: ``distance`` is not float32.
        ValueError: ``distance`` is not (N,), n or fraction out of range, or both are given.
    """
    _check_distance(distance)
    count = distance.shape[0] if n is None and fraction is None else _count(distance.shape[0], n, fraction)
    return RankResult(reference.rank_order(distance.detach())[:count], num_nonfinite(distance))


def select_top(
    distance: Tensor, *, n: int | None = None, fraction: float | None = None, backend: str | None = None
) -> Tensor:
    """The same rows as the first n of `rank`, without sorting the others, in ascending order of index.

    Args:
        distance: (N,) float32.
        n: How many rows, at most N; this or ``fraction`` must be given.
        fraction: The same as a fraction of N in [0, 1], rounded to the nearest count.
        backend: "reference" or "native"; by default the dispatcher takes the device's own.

    Returns:
        (n,) int64, ascending. Non-finite rows are among them only if there are fewer than n finite ones.

    Raises:
        TypeError: ``distance`` is not float32.
        ValueError: ``distance`` is not (N,), n or fraction out of range, both or neither given, or no such backend.
        RuntimeError: The backend asked for is not there on this machine.
    """
    _check_distance(distance)
    if n is None and fraction is None:
        raise ValueError("number of rows to select; got neither n nor fraction; accepted: one of them")
    count = _count(distance.shape[0], n, fraction)
    if backend is None:
        selected: Tensor = torch.ops.pbe_fast.select_smallest.default(distance.detach(), count)
        return selected
    if backend == "triton":
        raise ValueError("backend of select_top; got 'triton'; accepted: 'reference' (any device) or 'native' (CPU)")
    require(_OP, backend, distance)
    select = {"reference": reference.select_smallest, "native": _native_select}[backend]
    return select(distance.detach(), count)


def num_nonfinite(distance: Tensor) -> int:
    """How many distances are NaN or infinite."""
    return int(distance.numel() - distance.isfinite().sum().item())


def _count(total: int, n: int | None, fraction: float | None) -> int:
    if n is not None and fraction is not None:
        raise ValueError(f"number of rows; got n={n} and fraction={fraction}; accepted: one of them")
    if fraction is not None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction of rows; got {fraction}; accepted: 0 to 1")
        return round(fraction * total)
    if n is None or not 0 <= n <= total:
        raise ValueError(f"number of rows; got {n}; accepted: 0 to {total}")
    return n


def _check_pair(a: Tensor, b: Tensor) -> None:
    for name, logits in (("a", a), ("b", b)):
        if logits.dtype not in _DTYPES:
            raise TypeError(f"dtype of logits {name}; got {logits.dtype}; accepted: float32, float16, bfloat16")
    if a.dim() != 2 or a.shape != b.shape or a.shape[1] == 0:
        raise ValueError(f"shapes of logits; got {tuple(a.shape)} and {tuple(b.shape)}; accepted: the same (N, K >= 1)")
    if a.device != b.device:
        raise ValueError(f"devices of logits; got {a.device} and {b.device}; accepted: the same")


def _check_distance(distance: Tensor) -> None:
    if distance.dtype != torch.float32:
        raise TypeError(f"dtype of distances; got {distance.dtype}; accepted: float32")
    if distance.dim() != 1:
        raise ValueError(f"shape of distances; got {tuple(distance.shape)}; accepted: (N,)")


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _native_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = _rows(a), _rows(b)
    out = torch.empty(a.shape[0], dtype=torch.float32)
    native_op(_OP).distance(
        a.data_ptr(),
        b.data_ptr(),
        DTYPE_CODE[a.dtype],
        DTYPE_CODE[b.dtype],
        a.stride(0),
        b.stride(0),
        a.shape[0],
        a.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _triton_distance(a: Tensor, b: Tensor) -> Tensor:
    from pbe_fast.kernels.cosine_rank import triton_kernel  # only here: importing pbe_fast must not load Triton

    out = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    triton_kernel.distance(_rows(a), _rows(b), out)
    return out


def _native_select(distance: Tensor, n: int) -> Tensor:
    distance = distance.contiguous()
    out = torch.empty(n, dtype=torch.int64)
    native_op(_OP).select_smallest(distance.data_ptr(), distance.shape[0], n, out.data_ptr(), torch.get_num_threads())
    return out


LIB.define("cosine_distance(Tensor a, Tensor b) -> Tensor")
LIB.define("select_smallest(Tensor distance, int n) -> Tensor")


def _distance_op(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(a: Tensor, b: Tensor) -> Tensor:
        _check_pair(a, b)
        return run(a, b)

    return call


def _select_op(run: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    def call(distance: Tensor, n: int) -> Tensor:
        _check_distance(distance)
        _count(distance.shape[0], n, None)
        return run(distance, n)

    return call


def _cuda_distance(a: Tensor, b: Tensor) -> Tensor:
    return _triton_distance(a, b) if triton_installed() else reference.cosine_distance(a, b)


def _fake_distance(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.float32)


def _fake_select(distance: Tensor, n: int) -> Tensor:
    return distance.new_empty((n,), dtype=torch.int64)


_built = native_op(_OP) is not None
LIB.impl("cosine_distance", _distance_op(reference.cosine_distance), "CompositeExplicitAutograd")
LIB.impl("cosine_distance", _distance_op(_native_distance if _built else reference.cosine_distance), "CPU")
LIB.impl("cosine_distance", _distance_op(_cuda_distance), "CUDA")
LIB.impl("select_smallest", _select_op(reference.select_smallest), "CompositeExplicitAutograd")
LIB.impl("select_smallest", _select_op(_native_select if _built else reference.select_smallest), "CPU")
torch.library.register_fake("pbe_fast::cosine_distance", _distance_op(_fake_distance), lib=LIB)
torch.library.register_fake("pbe_fast::select_smallest", _select_op(_fake_select), lib=LIB)

# They use the functions above.
from pbe_fast.kernels.cosine_rank.qr_heads import QRHeads  # noqa: E402
from pbe_fast.kernels.cosine_rank.ranker import CosineRanker  # noqa: E402
