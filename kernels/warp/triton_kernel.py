"""The warp on a GPU; the formula and its edge cases are in reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbe_fast.kernels.aot import Case
from pbe_fast.kernels.warp import reference

# uint8 images of up to this many pixels are read once, in order, and sampled on the chip; others through the cache.
LARGEST_PLANE = 4096
BLOCK = 1024
# Images that share the taps which a program has loaded, unless that would leave processors idle.
GROUP, PROGRAMS = 16, 2048
STREAM = tl.constexpr(reference.STREAM)
HALF_EVEN = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _axis_taps(coordinate, SIZE: tl.constexpr):
    LAST: tl.constexpr = SIZE - 2 if SIZE > 2 else 0
    position = (coordinate + 1.0) * ((SIZE - 1) * 0.5)
    position = tl.where(position == position, position, 0.0)
    position = tl.minimum(tl.maximum(position, -2.0), SIZE * 1.0)
    low = tl.floor(position)
    fraction = position - low
    first = tl.minimum(tl.maximum(low, 0.0), LAST * 1.0)
    weight = tl.where(first == low, 1.0 - fraction, tl.where(first == low + 1.0, fraction, 0.0))
    next_weight = tl.where(first + 1.0 == low, 1.0 - fraction, tl.where(first == low, fraction, 0.0))
    return first.to(tl.int32), weight, next_weight


@triton.jit
def _noise(half):
    return (2 * half + 1).to(tl.int32).to(tl.float32) * (1.0 / 65536) - 1.0


@triton.jit
def _clamp(value):
    # Comparisons with NaN are false, so NaN passes, as in torch.clamp.
    value = tl.where(value < -1.0, -1.0, value)
    return tl.where(value > 1.0, 1.0, value)


@triton.jit
def _noisy_taps(
    x, y, image_id, seed, amplitude, first_pixel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr
):
    quad = first_pixel // 4 + tl.arange(0, N // 4)
    low, high = (image_id & 0xFFFFFFFF).to(tl.uint32), ((image_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad, STREAM, low, high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    x_tap, left, right = _axis_taps(_clamp(x + _noise(words & 0xFFFF) * amplitude), WIDTH)
    y_tap, upper, lower = _axis_taps(_clamp(y + _noise(words >> 16) * amplitude), HEIGHT)
    return y_tap * WIDTH + x_tap, upper * left, upper * right, lower * left, lower * right


@triton.jit
def _store(out, value, mean_ptr, std_ptr, channel, mask, RANGE: tl.constexpr, NORMALISED: tl.constexpr):
    if NORMALISED:
        mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
        value = value * tl.div_rn(1.0, std * RANGE) + tl.div_rn(-mean, std)
    elif RANGE != 1:
        value = value * tl.div_rn(1.0, RANGE * 1.0)
    if out.dtype.element_ty == tl.uint8:
        # In the sum the last mantissa bit is worth one, so the addition rounds half to even.
        value = ((value + HALF_EVEN) - HALF_EVEN).to(tl.int32)
    tl.store(out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _bank(pixel):
    # Threads store eight pixels each, so a warp's taps lie eight words apart, in four of shared memory's 32 banks;
    # this permutation, its own inverse, spreads them over all.
    return pixel ^ ((pixel >> 5) & 7)


@triton.jit
def _gather_packed(image, tap, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, RIGHT: tl.constexpr, DOWN: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """The four taps of each pixel, all uint8 channels in one word: one exchange between threads for the whole image."""
    pixel = _bank(tl.arange(0, BLOCK))
    packed = tl.zeros([BLOCK], dtype=tl.int32)
    for channel in tl.static_range(CHANNELS):
        plane = tl.load(image + channel * PIXELS + pixel, mask=pixel < PIXELS, other=0)
        packed = packed | (plane.to(tl.int32) << (8 * channel))
    taps = tl.join(tl.join(tap, tap + DOWN), tl.join(tap + RIGHT, tap + (DOWN + RIGHT)))
    left, right = tl.split(tl.gather(packed, _bank(taps).reshape(4 * BLOCK), 0).reshape(BLOCK, 2, 2))
    upper_left, lower_left = tl.split(left)
    upper_right, lower_right = tl.split(right)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit
def _weighted(weights, a, b, c, d):
    return ((weights[0] * a + weights[1] * b) + weights[2] * c) + weights[3] * d


@triton.jit
def _load_weighted(plane, tap, weights, mask, RIGHT: tl.constexpr, DOWN: tl.constexpr):
    a = tl.load(plane + tap, mask=mask, other=0).to(tl.float32)
    b = tl.load(plane + tap + RIGHT, mask=mask, other=0).to(tl.float32)
    c = tl.load(plane + tap + DOWN, mask=mask, other=0).to(tl.float32)
    d = tl.load(plane + tap + (DOWN + RIGHT), mask=mask, other=0).to(tl.float32)
    return _weighted(weights, a, b, c, d)


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    return ((words >> (8 * INDEX)) & 0xFF).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "batch", "group"])
def warp_kernel(
    images_ptr,
    out_ptr,
    offsets_ptr,
    weights_ptr,
    grid_ptr,
    ids_ptr,
    mean_ptr,
    std_ptr,
    batch,
    group,
    seed,
    amplitude,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NOISE: tl.constexpr,
    RANGE: tl.constexpr,
    NORMALISED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of pixels, of a group of images; RANGE is 255 where uint8 becomes float, else 1."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    BLOCKS: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    # In elements of memory: from a pixel to the next, and from a channel to the next.
    STEP: tl.constexpr = CHANNELS if CHANNELS_LAST else 1
    PLANE: tl.constexpr = 1 if CHANNELS_LAST else PIXELS
    RIGHT: tl.constexpr = 1 if WIDTH > 1 else 0
    DOWN: tl.constexpr = WIDTH if HEIGHT > 1 else 0
    first_pixel = (tl.program_id(0) % BLOCKS) * BLOCK
    first_image = (tl.program_id(0) // BLOCKS) * group
    pixel = first_pixel + tl.arange(0, BLOCK)
    if not PACKED:
        # It adds nothing (group is small), but the compiler does not know that. Seeing a run of pixels it would give
        # each thread several, and the taps of a warp would be spread over more cache lines.
        pixel = pixel ^ (group >> 30)
    mask = pixel < PIXELS
    if NOISE:
        x = tl.load(grid_ptr + 2 * pixel, mask=mask, other=0.0)
        y = tl.load(grid_ptr + 2 * pixel + 1, mask=mask, other=0.0)
    else:
        # Whatever the offsets, no tap leaves the plane.
        tap = tl.load(offsets_ptr + pixel, mask=mask, other=0)
        tap = tl.minimum(tl.maximum(tap, 0), PIXELS - 1 - DOWN - RIGHT)
        upper_left = tl.load(weights_ptr + pixel, mask=mask, other=0.0)
        upper_right = tl.load(weights_ptr + PIXELS + pixel, mask=mask, other=0.0)
        lower_left = tl.load(weights_ptr + 2 * PIXELS + pixel, mask=mask, other=0.0)
        lower_right = tl.load(weights_ptr + 3 * PIXELS + pixel, mask=mask, other=0.0)
    for image in range(first_image, tl.minimum(first_image + group, batch)):
        if NOISE:
            tap, upper_left, upper_right, lower_left, lower_right = _noisy_taps(
                x, y, tl.load(ids_ptr + image), seed, amplitude, first_pixel, HEIGHT, WIDTH, BLOCK
            )
        weights = (upper_left, upper_right, lower_left, lower_right)
        base = tl.full((), CHANNELS * PIXELS, tl.int64) * image
        out = out_ptr + base + pixel * STEP
        if PACKED:
            a, b, c, d = _gather_packed(images_ptr + base, tap, CHANNELS, PIXELS, RIGHT, DOWN, BLOCK)
            for channel in tl.static_range(CHANNELS):
                value = _weighted(weights, _byte(a, channel), _byte(b, channel), _byte(c, channel), _byte(d, channel))
                _store(out + channel * PLANE, value, mean_ptr, std_ptr, channel, mask, RANGE, NORMALISED)
        else:
            for channel in range(CHANNELS):
                plane = images_ptr + base + channel * PLANE
                value = _load_weighted(plane, tap * STEP, weights, mask, RIGHT * STEP, DOWN * STEP)
                _store(out + channel * PLANE, value, mean_ptr, std_ptr, channel, mask, RANGE, NORMALISED)


def _constants(channels: int, height: int, width: int, channels_last: bool, is_uint8: bool) -> dict[str, Any]:
    pixels = height * width
    packed = is_uint8 and not channels_last and channels <= 4 and pixels <= LARGEST_PLANE
    return {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS_LAST": channels_last,
        "PACKED": packed,
        "BLOCK": min(max(triton.next_power_of_2(pixels), 128), LARGEST_PLANE if packed else BLOCK),
    }


def _warps(constants: dict[str, Any]) -> int:
    # Taps that come one by one from the cache need more of a thread's registers each.
    return max(int(constants["BLOCK"]) // (256 if constants["PACKED"] else 128), 1)


def run(
    images: Tensor,
    out: Tensor,
    taps: tuple[Tensor, Tensor] | None,
    noise: tuple[Tensor, float, Tensor, int] | None,
    mean: Tensor | None,
    std: Tensor | None,
    channels_last: bool,
) -> None:
    """Writes out; either offsets and weights, or grid, amplitude, image ids and seed. All checked by the caller."""
    batch, channels, height, width = images.shape
    if images.numel() == 0:
        return
    # A kernel reads no pointer that its constants rule out, but each needs a tensor.
    offsets, weights = (images, images) if taps is None else taps
    grid, amplitude, ids, seed = (images, 0.0, images, 0) if noise is None else noise
    constants = _constants(channels, height, width, channels_last, images.dtype == torch.uint8)
    blocks = triton.cdiv(height * width, constants["BLOCK"])
    group = min(max(batch * blocks // PROGRAMS, 1), GROUP)
    with torch.cuda.device_of(images):
        warp_kernel[(blocks * triton.cdiv(batch, group),)](
            images,
            out,
            offsets,
            weights,
            grid,
            ids,
            images if mean is None else mean,
            images if std is None else std,
            batch,
            group,
            seed,
            amplitude,
            **constants,
            NOISE=noise is not None,
            RANGE=255 if images.dtype == torch.uint8 and out.dtype != torch.uint8 else 1,
            NORMALISED=mean is not None,
            num_warps=_warps(constants),
            # The order of roundings is part of the definition.
            enable_fp_fusion=False,
        )


def aot_cases() -> list[Case]:
    """The launch configurations in use, at digits, CIFAR and ImageNet sizes."""
    cases = []
    for channels, side, channels_last, noise, images, out in (
        (1, 8, False, False, "u8", "fp32"),
        (3, 32, False, False, "u8", "bf16"),
        (3, 32, False, True, "u8", "bf16"),
        (3, 32, True, False, "u8", "bf16"),
        (3, 32, False, False, "fp32", "fp32"),
        (3, 64, False, True, "u8", "u8"),
        (3, 224, False, False, "u8", "bf16"),
        (3, 224, False, True, "u8", "fp16"),
        (3, 224, True, True, "u8", "bf16"),
        (3, 224, True, False, "fp32", "fp32"),
    ):
        constants = _constants(channels, side, side, channels_last, images == "u8") | {
            "NOISE": noise,
            "RANGE": 255 if images == "u8" and out != "u8" else 1,
            "NORMALISED": out in ("bf16", "fp16"),
        }
        signature = {
            "images_ptr": f"*{images}",
            "out_ptr": f"*{out}",
            "offsets_ptr": "*i32",
            "weights_ptr": "*fp32",
            "grid_ptr": "*fp32",
            "ids_ptr": "*i64",
            "mean_ptr": "*fp32",
            "std_ptr": "*fp32",
            "batch": "i32",
            "group": "i32",
            "seed": "i64",
            "amplitude": "fp32",
        } | dict.fromkeys(constants, "constexpr")
        name = f"{images} -> {out} {channels}x{side}x{side}{' noise' * noise}{' channels_last' * channels_last}"
        cases.append(Case(name, warp_kernel, signature, constants, num_warps=_warps(constants)))
    return cases
