"""WaNet's warp: ``torch.ops.pbe_fast.warp`` (one grid for all) and ``warp_noise`` (a noisy grid per image)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.warp import reference
from pbe_fast.kernels.warp.plan import LARGEST, WarpPlan, check_grid, control_field, warp_grid

__all__ = ["WarpPlan", "control_field", "warp", "warp_grid"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (torch.uint8, *FLOATS)

backends.LIB.define(
    "warp(Tensor images, Tensor offsets, Tensor weights, Tensor? mean, Tensor? std, ScalarType out_dtype) -> Tensor"
)
backends.LIB.define(
    "warp_noise(Tensor images, Tensor grid, float amplitude, Tensor image_ids, int seed, Tensor? mean, Tensor? std, "
    "ScalarType out_dtype) -> Tensor"
)


class Taps(NamedTuple):
    """One grid for all images, as in `WarpPlan`."""

    offsets: Tensor
    weights: Tensor


class Noise(NamedTuple):
    """A grid that moves by up to ``amplitude`` (units of the grid), differently for each image."""

    grid: Tensor
    amplitude: float
    image_ids: Tensor
    seed: int


class Job(NamedTuple):
    """What every version works on: checked tensors, images and out dense and in one layout."""

    images: Tensor
    out: Tensor
    source: Taps | Noise
    mean: Tensor | None
    std: Tensor | None
    channels_last: bool


Run = Callable[[Job], None]


def warp(
    images: Tensor,
    grid: WarpPlan | Tensor,
    *,
    noise: float | None = None,
    image_ids: Tensor | None = None,
    seed: int = 0,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Samples images at the positions of a grid: bilinear, ``align_corners=True``, zeros outside.

    Args:
        images: (B, C, H, W), uint8 or float32, float16, bfloat16; contiguous or channels_last (else copied).
        grid: A `WarpPlan`, or float32 (H, W, 2) from which one is made for this call. On the device of ``images``.
        noise: None, or the amplitude of WaNet's cross mode (1 in the paper): every position of every image moves by
            ``noise * U(-1, 1) / H`` and is clamped to [-1, 1].
        image_ids: int64 (B,), required with ``noise``: together with ``seed`` they determine an image's noise, whatever
            the batch, the device and the version.
        seed: Of the noise, in [0, 2^63).
        mean: Normalisation per channel, (C,), in units of [0, 1]; given together with ``std``. float32 tensors
            on the device of ``images`` cost no copy.
        std: As ``mean``; positive.
        out_dtype: None keeps the dtype of ``images`` (uint8 with ``mean``: float32). uint8 images become floats in
            [0, 1], normalised where ``mean`` is given; uint8 stays uint8 by rounding, half to even.
        backend: "reference", "native" or "triton" by name; None lets the dispatcher choose by device.

    Returns:
        (B, C, H, W) in ``out_dtype``, in the layout of ``images``; carries no gradient.

    Raises:
        ValueError: Shapes, devices or options that do not fit together, or a grid with NaN or infinity.
        TypeError: A dtype that is not accepted.
        RuntimeError: ``backend`` is not available here.

    Source: Nguyen and Tran, WaNet, 2021; README.md has the formula and the edge cases.
    """
    if out_dtype is None:
        out_dtype = torch.float32 if images.dtype == torch.uint8 and mean is not None else images.dtype
    if images.dim() != 4:
        raise ValueError(f"images; got shape {tuple(images.shape)}; accepted: (B, C, H, W)")
    if (mean is None) != (std is None):
        raise ValueError("mean and std; got one of them; accepted: both or neither")
    mean, std = _per_channel("mean", mean, images), _per_channel("std", std, images)
    images = images.detach() if images.requires_grad else images
    if noise is None:
        plan = grid if isinstance(grid, WarpPlan) else WarpPlan.of(grid)
        shared = (images, plan.offsets, plan.weights, mean, std, out_dtype)
        if backend is None:
            return torch.ops.pbe_fast.warp.default(*shared)  # type: ignore[no-any-return]
        return _shared(_named(backend, images))(*shared)
    if image_ids is None:
        raise ValueError("image_ids; got None with noise; accepted: int64 (B,), which determine each image's noise")
    if not isinstance(grid, WarpPlan):
        check_grid(grid)
    positions = (grid.grid if isinstance(grid, WarpPlan) else grid).detach()
    own = (images, positions, noise / max(images.shape[2], 1), image_ids, seed, mean, std, out_dtype)
    if backend is None:
        return torch.ops.pbe_fast.warp_noise.default(*own)  # type: ignore[no-any-return]
    return _noisy(_named(backend, images))(*own)


def _per_channel(name: str, values: Tensor | Sequence[float] | None, images: Tensor) -> Tensor | None:
    if values is None or isinstance(values, Tensor):
        return values.detach() if values is not None and values.requires_grad else values
    if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
        raise ValueError(f"{name}; got {values}; accepted: finite{'' if name == 'mean' else ' and positive'}")
    return torch.tensor(values, dtype=torch.float32, device=images.device)


def _check(images: Tensor, source: Taps | Noise, mean: Tensor | None, std: Tensor | None, out: torch.dtype) -> None:
    shape = images.shape  # each look at a tensor takes a tenth of a microsecond
    if len(shape) != 4:
        raise ValueError(f"images; got shape {tuple(shape)}; accepted: (B, C, H, W)")
    batch, channels, height, width = shape
    if images.dtype not in DTYPES or out not in DTYPES:
        raise TypeError(f"images and out_dtype; got {images.dtype} and {out}; accepted: {DTYPES}")
    if out == torch.uint8 and (images.dtype != torch.uint8 or mean is not None):
        raise TypeError("out_dtype; got uint8 for float images or with mean; accepted: uint8 for plain uint8 images")
    if height < 1 or width < 1 or height * width * channels > LARGEST:
        raise ValueError(f"images; got shape {tuple(images.shape)}; accepted: at least 1 x 1, under 2^31 per image")
    if isinstance(source, Taps):
        _check_tensor("offsets", source.offsets, (height * width,), torch.int32, images)
        _check_tensor("weights", source.weights, (4, height * width), torch.float32, images)
    else:
        _check_tensor("grid", source.grid, (height, width, 2), torch.float32, images)
        _check_tensor("image_ids", source.image_ids, (batch,), torch.int64, images)
        if not math.isfinite(source.amplitude):
            raise ValueError(f"noise; got {source.amplitude}; accepted: finite")
        if not 0 <= source.seed < 2**63:
            raise ValueError(f"seed; got {source.seed}; accepted: 0 to 2^63 - 1")
    if (mean is None) != (std is None):
        raise ValueError("mean and std; got one of them; accepted: both or neither")
    if mean is not None and std is not None:
        _check_tensor("mean", mean, (channels,), torch.float32, images)
        _check_tensor("std", std, (channels,), torch.float32, images)


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, images: Tensor) -> None:
    if value.shape != shape or value.dtype != dtype or value.device != images.device:
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
        fitting = f"{dtype} {shape} on {images.device}"
        raise ValueError(f"{name} for images {tuple(images.shape)}; got {got}; accepted: {fitting}")


def _call(
    run: Run, images: Tensor, source: Taps | Noise, mean: Tensor | None, std: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    _check(images, source, mean, std, out_dtype)
    is_last = False
    if not images.is_contiguous():
        is_last = images.is_contiguous(memory_format=torch.channels_last)
        images = images if is_last else images.contiguous()
    out = torch.empty_like(images, dtype=out_dtype)
    mean, std = None if mean is None else mean.contiguous(), None if std is None else std.contiguous()
    run(Job(images, out, source, mean, std, is_last))
    return out


def _shared(run: Run) -> Callable[..., Tensor]:
    def call(
        images: Tensor,
        offsets: Tensor,
        weights: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return _call(run, images, Taps(offsets.contiguous(), weights.contiguous()), mean, std, out_dtype)

    return call


def _noisy(run: Run) -> Callable[..., Tensor]:
    def call(
        images: Tensor,
        grid: Tensor,
        amplitude: float,
        image_ids: Tensor,
        seed: int,
        mean: Tensor | None,
        std: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        source = Noise(grid.contiguous(), amplitude, image_ids.contiguous(), seed)
        return _call(run, images, source, mean, std, out_dtype)

    return call


def _run_reference(job: Job) -> None:
    if isinstance(job.source, Taps):
        taps = job.source.offsets, job.source.weights
    else:
        moved = reference.noisy_grid(job.source.grid, job.source.amplitude, job.source.image_ids, job.source.seed)
        taps = reference.taps(moved, *job.source.grid.shape[:2])
    job.out.copy_(reference.sample(job.images, *taps, job.mean, job.std, job.out.dtype))


def _run_native(job: Job) -> None:
    images = job.images if job.images.dtype == torch.uint8 else job.images.float()
    common = (
        images.data_ptr(),
        job.out.data_ptr(),
        backends.DTYPE_CODE[images.dtype],
        backends.DTYPE_CODE[job.out.dtype],
        *images.shape,
        job.channels_last,
        backends.address(job.mean),
        backends.address(job.std),
        torch.get_num_threads(),
    )
    source, native = job.source, backends.native_op("warp")
    if isinstance(source, Taps):
        native.run(*common, source.offsets.data_ptr(), source.weights.data_ptr())
    else:
        ids = source.image_ids.data_ptr()
        native.run_noise(*common, source.grid.data_ptr(), source.amplitude, ids, source.seed)


def _run_triton(job: Job) -> None:
    from pbe_fast.kernels.warp import triton_kernel  # not before a GPU tensor comes along

    source = job.source
    if isinstance(source, Taps):
        taps, noise = (source.offsets, source.weights), None
    else:
        taps, noise = None, (source.grid, source.amplitude, source.image_ids, source.seed)
    triton_kernel.run(job.images, job.out, taps, noise, job.mean, job.std, job.channels_last)


def _run_nothing(job: Job) -> None:
    """What a fake tensor gets: the checks, and an output of the right shape."""


@functools.cache
def _cuda() -> Run:
    return _run_triton if backends.triton_installed() else _run_reference


RUNS: dict[str, Run] = {"reference": _run_reference, "native": _run_native, "triton": _run_triton}
_cpu = _run_native if backends.native_op("warp") is not None else _run_reference

for _name, _form in (("warp", _shared), ("warp_noise", _noisy)):
    backends.LIB.impl(_name, _form(_run_reference), "CompositeExplicitAutograd")
    backends.LIB.impl(_name, _form(_cpu), "CPU")
    backends.LIB.impl(_name, _form(lambda job: _cuda()(job)), "CUDA")
    torch.library.register_fake(f"pbe_fast::{_name}", _form(_run_nothing), lib=backends.LIB)


def _named(backend: str, images: Tensor) -> Run:
    backends.require("warp", backend, images)
    return RUNS[backend]
