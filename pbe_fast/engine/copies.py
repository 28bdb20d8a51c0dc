"""Working on a copy of the user's model, and giving it back as a model of the same kind."""

from __future__ import annotations

import copy

import torch
from torch import nn


def frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on ``device`` in float32 and channels_last, in eval mode, whose parameters take no gradients."""
    copied: nn.Module = copy.deepcopy(model).to(device=device, dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied.eval().requires_grad_(False)


def restored(model: nn.Module, original: nn.Module) -> nn.Module:
    """``model`` in eval mode, with devices, dtypes and ``requires_grad`` of the model that it is a copy of."""
    for before, parameter in zip(original.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
        parameter.data = parameter.data.to(before.device, before.dtype)
    for old_buffer, buffer in zip(original.buffers(), model.buffers(), strict=True):
        buffer.data = buffer.data.to(old_buffer.device, old_buffer.dtype)
    return model.eval()
