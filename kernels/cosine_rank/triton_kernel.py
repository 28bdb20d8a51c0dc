"""Cosine distances on a GPU, in float32; the definition and its edge cases are in reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbe_fast.kernels.aot import Case

# A row of at most this many classes stays in registers between the norms and the difference; a longer one is read
# twice, the second time from the cache.
LARGEST_TILE = 4096
# Elements of either tensor that one warp holds: 32 registers a thread for each of the two. A row of that length belongs
# to one warp, so that its sums need neither shared memory nor barriers. Short rows need more registers for their
# addresses and norms, and get a quarter of it.
WARP_TILE = 1024
SHORT_ROW, SHORT_WARPS = 128, 4
LOOP_BLOCK, LOOP_WARPS = 4096, 8


@triton.jit
def _load(row_ptrs, column, mask):
    # Widened at once: arithmetic in bf16 would round every intermediate.
    return tl.load(row_ptrs + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unsafe(squared_norm):
    # Outside of this range squares of a row may have overflowed, or underflowed by more than rounding hides. A zero row
    # counts as unsafe as well; scaling leaves it what it is.
    return ((squared_norm < 2.0**-60) | (squared_norm > 2.0**126)).to(tl.int32)


@triton.jit
def _scale(largest):
    # The power of two that brings the largest magnitude of a row near 1, exactly: 2^(127 - field) from the exponent
    # field of its bits. The bounds keep both numbers normal.
    field = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(field, 1), 253)
    return ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _difference(a, b, inverse_a, inverse_b):
    # a/|a| - b/|b|, rounded once instead of twice: where the two nearly agree, the rounding of the products would be
    # the larger part of what is left of them. The second fma is the error of the first product.
    product = b * inverse_b
    error = tl.fma(b, inverse_b, -product)
    return tl.fma(a, inverse_a, -product) - error


@triton.jit
def _inverse(squared_norm):
    return 1.0 / tl.sqrt(squared_norm)


@triton.jit
def _finish(half_sum, squared_a, squared_b):
    # A zero row: cosine 0. With a non-finite row beside it the product is NaN, and NaN passes all of these comparisons.
    distance = tl.where(half_sum > 2.0, 2.0, half_sum)
    return tl.where(squared_a * squared_b == 0.0, 1.0, distance)


@triton.jit
def tile_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_RANGE: tl.constexpr,
):
    """ROWS rows of up to BLOCK classes, read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < CLASSES)
    a = _load(a_ptr + (row * STRIDE_A)[:, None], column, mask)
    b = _load(b_ptr + (row * STRIDE_B)[:, None], column, mask)
    squared_a = tl.sum(a * a, 1)
    squared_b = tl.sum(b * b, 1)
    if WIDE_RANGE:  # noqa: SIM102 (a constant: the branch is not compiled)
        if tl.max(_unsafe(squared_a) | _unsafe(squared_b), 0) > 0:
            a = a * _scale(tl.max(tl.abs(a), 1))[:, None]
            b = b * _scale(tl.max(tl.abs(b), 1))[:, None]
            squared_a = tl.sum(a * a, 1)
            squared_b = tl.sum(b * b, 1)
    difference = _difference(a, b, _inverse(squared_a)[:, None], _inverse(squared_b)[:, None])
    half_sum = 0.5 * tl.sum(difference * difference, 1)
    tl.store(out_ptr + row, _finish(half_sum, squared_a, squared_b), mask=row < rows)


@triton.jit
def loop_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_RANGE: tl.constexpr,
):
    """One row of any length, in blocks: once for the norms, once for the difference."""
    row = tl.program_id(0).to(tl.int64)
    a_row = a_ptr + row * STRIDE_A
    b_row = b_ptr + row * STRIDE_B
    squares_a = tl.zeros((BLOCK,), tl.float32)
    squares_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a = _load(a_row, column, column < CLASSES)
        b = _load(b_row, column, column < CLASSES)
        squares_a += a * a
        squares_b += b * b
    squared_a = tl.sum(squares_a, 0)
    squared_b = tl.sum(squares_b, 0)
    scale_a = tl.full((), 1.0, tl.float32)
    scale_b = tl.full((), 1.0, tl.float32)
    if WIDE_RANGE:  # noqa: SIM102 (a constant: the branch is not compiled)
        if (_unsafe(squared_a) | _unsafe(squared_b)) > 0:
            largest_a = tl.zeros((BLOCK,), tl.float32)
            largest_b = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, CLASSES, BLOCK):
                column = start + tl.arange(0, BLOCK)
                largest_a = tl.maximum(largest_a, tl.abs(_load(a_row, column, column < CLASSES)))
                largest_b = tl.maximum(largest_b, tl.abs(_load(b_row, column, column < CLASSES)))
            scale_a = _scale(tl.max(largest_a, 0))
            scale_b = _scale(tl.max(largest_b, 0))
            squares_a = tl.zeros((BLOCK,), tl.float32)
            squares_b = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, CLASSES, BLOCK):
                column = start + tl.arange(0, BLOCK)
                a = _load(a_row, column, column < CLASSES) * scale_a
                b = _load(b_row, column, column < CLASSES) * scale_b
                squares_a += a * a
                squares_b += b * b
            squared_a = tl.sum(squares_a, 0)
            squared_b = tl.sum(squares_b, 0)
    inverse_a = _inverse(squared_a)
    inverse_b = _inverse(squared_b)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a = _load(a_row, column, column < CLASSES) * scale_a
        b = _load(b_row, column, column < CLASSES) * scale_b
        difference = _difference(a, b, inverse_a, inverse_b)
        total += difference * difference
    tl.store(out_ptr + row, _finish(0.5 * tl.sum(total, 0), squared_a, squared_b))


def _wide_range(dtype_a: torch.dtype, dtype_b: torch.dtype) -> bool:
    # Squares of float16 numbers neither overflow float32 nor vanish in it.
    return not dtype_a == dtype_b == torch.float16


def _launch(classes: int, stride_a: int, stride_b: int, wide_range: bool) -> tuple[dict[str, Any], int, int]:
    """(constants, warps, rows per program); without ROWS among the constants they are for `loop_kernel`."""
    # The strides are constants because of a stride of 1000 Triton would only learn that it is no multiple of 16, and
    # load 2 bytes at a time.
    constants = {"STRIDE_A": stride_a, "STRIDE_B": stride_b, "CLASSES": classes, "WIDE_RANGE": wide_range}
    if classes > LARGEST_TILE:
        return constants | {"BLOCK": LOOP_BLOCK}, LOOP_WARPS, 1
    block = int(triton.next_power_of_2(classes))
    rows, warps = max(WARP_TILE // block, 1), max(block // WARP_TILE, 1)
    if block <= SHORT_ROW:
        warps = SHORT_WARPS
    return constants | {"BLOCK": block, "ROWS": rows}, warps, rows


def distance(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes the distances of a's and b's rows; (N, K) and (N,), rows dense, checked by the caller."""
    rows, classes = a.shape
    if rows == 0:
        return
    constants, warps, tile_rows = _launch(classes, a.stride(0), b.stride(0), _wide_range(a.dtype, b.dtype))
    kernel = tile_kernel if "ROWS" in constants else loop_kernel
    with torch.cuda.device_of(a):
        kernel[(triton.cdiv(rows, tile_rows),)](a, b, out, rows, **constants, num_warps=warps)


def aot_cases() -> list[Case]:
    """The launch configurations in use, from two classes to more than a tile holds."""
    cases = []
    for types, sizes in (
        ("bf16 bf16", (2, 43, 200, 1000, 4000, 21841)),
        ("fp32 fp32", (10, 200, 1000, 4000, 21841)),
        ("fp16 fp16", (10, 1000)),
        ("bf16 fp32", (10, 1000)),
    ):
        type_a, type_b = types.split()
        for classes in sizes:
            pointers = {"a_ptr": f"*{type_a}", "b_ptr": f"*{type_b}", "out_ptr": "*fp32"}
            constants, warps, _ = _launch(classes, classes, classes, type_a != "fp16")
            kernel = tile_kernel if "ROWS" in constants else loop_kernel
            types_of = pointers | {"rows": "i32"} | dict.fromkeys(constants, "constexpr")
            signature = {name: types_of[name] for name in kernel.arg_names}
            cases.append(Case(f"{types} x {classes}", kernel, signature, constants, num_warps=warps))
    return cases
