"""One PGD step on a GPU; the formula and its edge cases are in reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbe_fast.kernels.aot import Case

LINF_BLOCK, LINF_WARPS = 1024, 4
# An image of at most this many elements takes one launch for an L2 step: it stays in registers between the norm and the
# step. A larger one takes a launch for sums over its blocks, and a second for the step.
L2_BLOCK, L2_WARPS = 4096, 8

POINTERS = ("adv_ptr", "grad_ptr", "origin_ptr", "next_ptr", "input_ptr", "mean_ptr", "std_ptr")


@triton.jit
def _locate(CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    # (start of the image, offsets in it, which of them are inside, their channels). The sizes are constants of the
    # kernel, so that none of the divisions is a real one; only the start of an image needs 64 bits.
    SIZE: tl.constexpr = CHANNELS * PIXELS
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    base = (program // BLOCKS).to(tl.int64) * SIZE
    offset = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    channel = offset % CHANNELS if CHANNELS_LAST else offset // PIXELS
    return base, offset, offset < SIZE, channel


@triton.jit
def _clamp(value, low, high):
    # Comparisons with NaN are false, so that NaN passes, as in torch.clamp.
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def _load(pointer, base, offset, mask):
    # Widened at once: arithmetic in bf16 would round every intermediate.
    return tl.load(pointer + base + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_pixel_grad(grad_ptr, std_ptr, base, offset, mask, channel, NORMALISED: tl.constexpr):
    grad = _load(grad_ptr, base, offset, mask)
    if NORMALISED:
        grad = grad / tl.load(std_ptr + channel, mask=mask, other=1.0)
    return grad


@triton.jit
def _store(
    next_ptr,
    input_ptr,
    mean_ptr,
    std_ptr,
    value,
    base,
    offset,
    mask,
    channel,
    NORMALISED: tl.constexpr,
    HAS_INPUT: tl.constexpr,
):
    tl.store(next_ptr + base + offset, value, mask=mask)
    if HAS_INPUT:
        if NORMALISED:
            mean = tl.load(mean_ptr + channel, mask=mask, other=0.0)
            std = tl.load(std_ptr + channel, mask=mask, other=1.0)
            value = (value - mean) / std
        tl.store(input_ptr + base + offset, value.to(input_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linf_kernel(
    adv_ptr,
    grad_ptr,
    origin_ptr,
    next_ptr,
    input_ptr,
    mean_ptr,
    std_ptr,
    eps,
    alpha,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one image."""
    base, offset, mask, channel = _locate(CHANNELS, PIXELS, CHANNELS_LAST, BLOCK)
    adv = _load(adv_ptr, base, offset, mask)
    origin = _load(origin_ptr, base, offset, mask)
    grad = _load(grad_ptr, base, offset, mask)
    sign = tl.where(grad > 0, 1.0, 0.0) - tl.where(grad < 0, 1.0, 0.0)
    delta = _clamp(adv + alpha * sign - origin, -eps, eps)
    value = _clamp(origin + delta, 0.0, 1.0)
    _store(next_ptr, input_ptr, mean_ptr, std_ptr, value, base, offset, mask, channel, NORMALISED, HAS_INPUT)


@triton.jit
def _sums(grad, delta):
    # float64: squares of a saturated model's gradients (1e-25) vanish in float32.
    grad = grad.to(tl.float64)
    delta = delta.to(tl.float64)
    return tl.sum(grad * grad, 0), tl.sum(grad * delta, 0), tl.sum(delta * delta, 0)


@triton.jit
def l2_sums_kernel(
    adv_ptr,
    grad_ptr,
    origin_ptr,
    std_ptr,
    sums_ptr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<g, g>, <g, d>, <d, d> of one block of one image, g the gradient and d = adv - origin; sums is (blocks, 3)."""
    base, offset, mask, channel = _locate(CHANNELS, PIXELS, CHANNELS_LAST, BLOCK)
    grad = _load_pixel_grad(grad_ptr, std_ptr, base, offset, mask, channel, NORMALISED)
    delta = _load(adv_ptr, base, offset, mask) - _load(origin_ptr, base, offset, mask)
    grad_grad, grad_delta, delta_delta = _sums(grad, delta)
    row = sums_ptr + tl.program_id(0) * 3
    tl.store(row, grad_grad)
    tl.store(row + 1, grad_delta)
    tl.store(row + 2, delta_delta)


@triton.jit
def l2_kernel(
    adv_ptr,
    grad_ptr,
    origin_ptr,
    next_ptr,
    input_ptr,
    mean_ptr,
    std_ptr,
    sums_ptr,
    eps,
    alpha,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    """One block of one image; with BLOCKS = 1 it is the image, and the sums are taken here."""
    base, offset, mask, channel = _locate(CHANNELS, PIXELS, CHANNELS_LAST, BLOCK)
    adv = _load(adv_ptr, base, offset, mask)
    origin = _load(origin_ptr, base, offset, mask)
    grad = _load_pixel_grad(grad_ptr, std_ptr, base, offset, mask, channel, NORMALISED)
    if BLOCKS == 1:
        grad_grad, grad_delta, delta_delta = _sums(grad, adv - origin)
    else:
        block = tl.arange(0, PADDED_BLOCKS)
        row = sums_ptr + ((tl.program_id(0) // BLOCKS) * BLOCKS + block) * 3
        grad_grad = tl.sum(tl.load(row, mask=block < BLOCKS, other=0.0), 0)
        grad_delta = tl.sum(tl.load(row + 1, mask=block < BLOCKS, other=0.0), 0)
        delta_delta = tl.sum(tl.load(row + 2, mask=block < BLOCKS, other=0.0), 0)

    # |d + alpha g/|g||^2 from the three sums. The bounds are reference.SMALLEST_NORM and LARGEST_NORM, squared.
    has_step = (grad_grad >= 2.0**-252) & (grad_grad <= 2.0**252)
    length = tl.sqrt(tl.where(has_step, grad_grad, 1.0))
    size = tl.where(has_step, alpha, 0.0).to(tl.float64)
    along = tl.where(has_step, grad_delta / length, 0.0)
    squared = delta_delta + 2.0 * size * along + size * size
    radius = tl.sqrt(tl.where(squared > 0.0, squared, 0.0))
    shrink = tl.where(radius > eps, eps / tl.where(radius > eps, radius, 1.0), 1.0).to(tl.float32)
    inverse = (1.0 / length).to(tl.float32)

    direction = tl.where(has_step, grad * inverse, 0.0)
    delta = (adv + alpha * direction - origin) * shrink
    value = _clamp(origin + delta, 0.0, 1.0)
    _store(next_ptr, input_ptr, mean_ptr, std_ptr, value, base, offset, mask, channel, NORMALISED, HAS_INPUT)


def _constants(channels: int, pixels: int, channels_last: bool, normalised: bool, block: int) -> dict[str, Any]:
    return {
        "CHANNELS": channels,
        "PIXELS": pixels,
        "CHANNELS_LAST": channels_last,
        "NORMALISED": normalised,
        "BLOCK": block,
    }


def _block(size: int, largest: int) -> int:
    return int(min(max(triton.next_power_of_2(size), 128), largest))


def run(
    adv: Tensor,
    grad: Tensor,
    origin: Tensor,
    adv_next: Tensor,
    model_input: Tensor | None,
    eps: float,
    alpha: float,
    norm: str,
    mean: Tensor | None,
    std: Tensor | None,
    channels_last: bool,
) -> None:
    """Writes adv_next (may be adv) and model_input; all tensors dense, in one layout, checked by the caller."""
    images, channels, height, width = adv.shape
    if adv.numel() == 0:
        return
    size = channels * height * width
    block = _block(size, LINF_BLOCK if norm == "linf" else L2_BLOCK)
    blocks = triton.cdiv(size, block)
    constants = _constants(channels, height * width, channels_last, mean is not None, block)
    # A kernel reads no pointer that its constants rule out, but each needs a tensor of its type.
    input_or_any = adv_next if model_input is None else model_input
    mean_or_any = adv if mean is None else mean
    std_or_any = adv if std is None else std
    tensors = (adv, grad, origin, adv_next, input_or_any, mean_or_any, std_or_any)
    has_input = model_input is not None
    grid = (images * blocks,)
    with torch.cuda.device_of(adv):
        if norm == "linf":
            linf_kernel[grid](*tensors, eps, alpha, **constants, HAS_INPUT=has_input, num_warps=LINF_WARPS)
            return
        sums = adv
        if blocks > 1:
            sums = torch.empty(images * blocks * 3, dtype=torch.float64, device=adv.device)
            l2_sums_kernel[grid](adv, grad, origin, std_or_any, sums, **constants, num_warps=L2_WARPS)
        padded = triton.next_power_of_2(blocks)
        l2_kernel[grid](
            *tensors,
            sums,
            eps,
            alpha,
            **constants,
            HAS_INPUT=has_input,
            BLOCKS=blocks,
            PADDED_BLOCKS=padded,
            num_warps=L2_WARPS,
        )


def aot_cases() -> list[Case]:
    """The launch configurations in use, at CIFAR and ImageNet sizes."""
    cases = []
    for half, pixels, channels_last in (
        ("fp32", 32 * 32, False),
        ("bf16", 32 * 32, True),
        ("bf16", 224 * 224, True),
        ("fp16", 224 * 224, False),
    ):
        name = f"{half} 3x{pixels}{' channels_last' if channels_last else ''}"
        types = dict.fromkeys(POINTERS, "*fp32") | {"grad_ptr": f"*{half}", "input_ptr": f"*{half}"}

        def add(kernel: Any, warps: int, arguments: dict[str, str], constants: dict[str, Any], name: str) -> None:
            signature = arguments | dict.fromkeys(constants, "constexpr")
            cases.append(Case(name, kernel, signature, constants, num_warps=warps))

        numbers = {"eps": "fp32", "alpha": "fp32"}
        constants = _constants(3, pixels, channels_last, True, LINF_BLOCK) | {"HAS_INPUT": True}
        add(linf_kernel, LINF_WARPS, types | numbers, constants, f"linf {name}")

        constants = _constants(3, pixels, channels_last, True, _block(3 * pixels, L2_BLOCK))
        blocks = triton.cdiv(3 * pixels, L2_BLOCK)
        if blocks > 1:
            read = {name: types[name] for name in ("adv_ptr", "grad_ptr", "origin_ptr", "std_ptr")}
            add(l2_sums_kernel, L2_WARPS, read | {"sums_ptr": "*fp64"}, constants, f"l2 sums {name}")
        constants = constants | {"HAS_INPUT": True, "BLOCKS": blocks, "PADDED_BLOCKS": triton.next_power_of_2(blocks)}
        sums = {"sums_ptr": "*fp64" if blocks > 1 else "*fp32"}
        add(l2_kernel, L2_WARPS, types | sums | numbers, constants, f"l2 {name}")
    return cases
