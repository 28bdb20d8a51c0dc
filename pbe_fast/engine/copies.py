"""Working on a copy of the user's model, and giving it back as a model of the same kind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pbe_fast.errors import InputError


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with ``model``.

    Of what its forward pass computed and it has kept, features for one, the values are copied, not how they arose.

    Raises:
        InputError: A model that cannot be copied, as one that holds a lock.
    """
    kept = pytree.tree_leaves([vars(module) for module in model.modules()])
    memo = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever its own __deepcopy__ or __reduce__ does
        raise InputError(
            f"the model cannot be copied (copy.deepcopy): {type(model).__name__}",
            got=f"{type(error).__name__}: {error}",
            accepted="a module that holds parameters, buffers, submodules and plain values",
        ) from error


def working_copy(model: nn.Module, device: torch.device, image_shape: tuple[int, ...] | None = None) -> nn.Module:
    """A copy on ``device`` in float32, and in channels_last where the model can be.

    One that flattens feature maps by ``view`` cannot. Its copy is fed plain NCHW, by a hook: see `without_hook`.

    Args:
        model: Any network, or a working copy.
        device: Where to.
        image_shape: (C, H, W) of its images, to try it on one; without, channels_last if ``model`` is no such copy.
    """
    copied = deep_copy(model).to(device=device, dtype=torch.float32)
    if image_shape is not None and not needs_planes(copied) and not _takes_channels_last(copied, image_shape):
        copied.register_forward_pre_hook(_in_planes)
    if not needs_planes(copied):
        copied = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def frozen_copy(model: nn.Module, device: torch.device, image_shape: tuple[int, ...] | None = None) -> nn.Module:
    """A `working_copy` in eval mode, whose parameters take no gradients."""
    return working_copy(model, device, image_shape).eval().requires_grad_(False)


def needs_planes(model: nn.Module) -> bool:
    """Whether this is a working copy that cannot be in channels_last."""
    return _in_planes in model._forward_pre_hooks.values()


def without_hook(model: nn.Module) -> nn.Module:
    """A working copy as its user knows it."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _in_planes]:
        del model._forward_pre_hooks[key]
    return model


def restored(model: nn.Module, original: nn.Module) -> nn.Module:
    """``model`` in eval mode, with devices, dtypes and ``requires_grad`` of the model that it is a copy of."""
    for before, parameter in zip(original.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
        parameter.data = parameter.data.to(before.device, before.dtype)
    for old_buffer, buffer in zip(original.buffers(), model.buffers(), strict=True):
        buffer.data = buffer.data.to(old_buffer.device, old_buffer.dtype)
    return without_hook(model).eval()


def in_planes(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with the strides of NCHW."""
    # Not contiguous(), to which one channel is in order as it is, while a convolution still takes it as channels_last.
    planes: Tensor = images.flatten(1).unflatten(1, images.shape[1:])
    return planes


def _in_planes(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (in_planes(args[0]), *args[1:]) if args else args


def _takes_channels_last(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Tried on a copy, whose forward pass may change what it holds."""
    tried = deep_copy(model).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    device = next((p.device for p in tried.parameters()), torch.device("cpu"))
    images = torch.zeros(2, *image_shape, dtype=torch.float32, device=device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            tried(images.contiguous(memory_format=torch.channels_last))
    except Exception:  # why is told where the copy is used
        return False
    return True
