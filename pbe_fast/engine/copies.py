"""Working on a copy of the user's model, and giving it back as a model of the same kind."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pbe_fast.errors import InputError


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with ``model``.

    Raises:
        InputError: A model that cannot be copied, as one that holds a lock, or a tensor that was computed.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever its own __deepcopy__ or __reduce__ does
        raise InputError(
            f"the model cannot be copied (copy.deepcopy): {type(model).__name__}",
            got=f"{type(error).__name__}: {error}",
            accepted="a module that holds parameters, buffers, submodules and plain values",
        ) from error


def frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on ``device`` in float32 and channels_last, in eval mode, whose parameters take no gradients."""
    copied: nn.Module = deep_copy(model).to(device=device, dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied.eval().requires_grad_(False)


def restored(model: nn.Module, original: nn.Module) -> nn.Module:
    """``model`` in eval mode, with devices, dtypes and ``requires_grad`` of the model that it is a copy of."""
    for before, parameter in zip(original.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
        parameter.data = parameter.data.to(before.device, before.dtype)
    for old_buffer, buffer in zip(original.buffers(), model.buffers(), strict=True):
        buffer.data = buffer.data.to(old_buffer.device, old_buffer.dtype)
    return model.eval()
