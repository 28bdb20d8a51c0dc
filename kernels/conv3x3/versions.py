"""The versions of the two operations of conv3x3, and what they all refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pbe_fast.kernels import backends
from pbe_fast.kernels.conv3x3 import reference

_GROUP = reference.GROUP


class Conv(NamedTuple):
    """What every version works on: the arguments of the operator, checked."""

    x: Tensor
    mask: Tensor | None
    packed: Tensor
    packed_transposed: Tensor
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
    channels_out: int


class Version(NamedTuple):
    """One version of the two operations."""

    pack: Callable[[Tensor, bool], Tensor]
    conv: Callable[[Conv], Tensor]


def check_weight(weight: Tensor) -> None:
    """Refuses what is no weight of a 3 x 3 convolution."""
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
        raise ValueError(f"weight; got {weight.dtype} {tuple(weight.shape)}; accepted: floating point (K, C, 3, 3)")


def check(job: Conv) -> None:
    """Refuses tensors that do not fit together; see `pbe_fast.kernels.conv3x3.conv3x3`."""
    x, shape, channels_out, device = job.x, job.x.shape, job.channels_out, job.x.device
    if len(shape) != 4 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"x; got shape {tuple(shape)}; accepted: (B, C, H, W), at least 1 x 1")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x; got {x.dtype}; accepted: bfloat16")
    _check_filters("packed", job.packed, channels_out, shape[1], device)
    _check_filters("packed_transposed", job.packed_transposed, shape[1], channels_out, device)
    if job.mask is not None:
        backends.require_bf16("mask", job.mask, shape, device)
    if job.residual is not None:
        backends.require_bf16("residual", job.residual, torch.Size((shape[0], channels_out, *shape[2:])), device)
    bias = job.bias
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (channels_out,) or bias.device != device):
        got = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise ValueError(f"bias; got {got}; accepted: float32 ({channels_out},) on {device}")


def _check_filters(name: str, filters: Tensor, channels_out: int, channels_in: int, device: torch.device) -> None:
    shape = _packed_shape(channels_out, channels_in)
    fits = filters.dtype == torch.bfloat16 and filters.shape == shape and filters.is_contiguous()
    if not fits or filters.device != device:
        raise ValueError(
            f"{name}; got {filters.dtype} {tuple(filters.shape)} on {filters.device}; accepted: contiguous bfloat16 "
            f"{shape} on {device}, as from pack for {channels_in} channels in and {channels_out} out"
        )


def _packed_shape(channels_out: int, channels_in: int) -> tuple[int, ...]:
    groups_out, groups_in = -(-channels_out // _GROUP), -(-channels_in // _GROUP)
    return (groups_out, 16, groups_in * _GROUP // 2, _GROUP, 2)


def _pack_native(weight: Tensor, transposed: bool) -> Tensor:
    channels_out, channels_in = weight.shape[:2]
    # (K, 3, 3, C): what channels_last has.
    rows = weight.to(torch.float32).permute(0, 2, 3, 1).contiguous()
    if transposed:
        sizes = (channels_in, channels_out)
        strides = (9 * channels_in, channels_in)
    else:
        rows = rows.view(channels_out, -1).t().contiguous()
        sizes = (channels_out, channels_in)
        strides = (channels_out, channels_in * channels_out)
    packed = torch.empty(_packed_shape(*sizes), dtype=torch.bfloat16)
    backends.native_op("conv3x3").pack(
        rows.data_ptr(), *sizes, *strides, transposed, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def _conv_native(job: Conv) -> Tensor:
    batch, channels_in, height, width = job.x.shape
    out = _conv_nothing(job)
    x = backends.channels_last(job.x)
    mask, residual = (None if t is None else backends.channels_last(t) for t in (job.mask, job.residual))
    bias = None if job.bias is None else job.bias.contiguous()
    backends.native_op("conv3x3").run(
        backends.address(x),
        backends.address(mask),
        job.packed.data_ptr(),
        backends.address(bias),
        backends.address(residual),
        out.data_ptr(),
        batch,
        height,
        width,
        channels_in,
        job.channels_out,
        job.relu,
        torch.get_num_threads(),
    )
    return out


def _conv_nothing(job: Conv) -> Tensor:
    # No view of other memory: a model may change it in place.
    shape = (job.x.shape[0], job.channels_out, *job.x.shape[2:])
    return torch.empty(shape, dtype=torch.bfloat16, device=job.x.device, memory_format=torch.channels_last)


def _pack_nothing(weight: Tensor, transposed: bool) -> Tensor:
    channels_out, channels_in = weight.shape[:2]
    shape = _packed_shape(channels_in, channels_out) if transposed else _packed_shape(channels_out, channels_in)
    return weight.new_empty(shape, dtype=torch.bfloat16)


def _conv_reference(job: Conv) -> Tensor:
    return reference.conv3x3(job.x, job.mask, job.packed, job.bias, job.residual, job.relu, job.channels_out)


REFERENCE = Version(reference.pack, _conv_reference)
NATIVE = Version(_pack_native, _conv_native)
# What a fake tensor gets: outputs of the right shape.
NOTHING = Version(_pack_nothing, _conv_nothing)
