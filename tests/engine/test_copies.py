from __future__ import annotations

import copy

import torch
from torch import nn

from pbe_fast.engine.copies import frozen_copy, restored


def half_model() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half().train()
    model[0].requires_grad_(False)
    return model


def test_a_frozen_copy_is_of_float32_and_leaves_the_model_alone() -> None:
    model = half_model()
    before = copy.deepcopy(model.state_dict())
    copied = frozen_copy(model, torch.device("cpu"))
    assert not copied.training and model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in copied.parameters())
    assert copied.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        copied.get_parameter("0.weight").fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_comes_back_is_of_the_kind_that_was_given() -> None:
    model = half_model()
    worked_on = frozen_copy(model, torch.device("cpu")).requires_grad_(True).train()
    back = restored(worked_on, model)
    assert not any(m.training for m in back.modules())
    for (name, wanted), found in zip(model.named_parameters(), back.parameters(), strict=True):
        assert (found.dtype, found.requires_grad) == (wanted.dtype, wanted.requires_grad), name
    for wanted_buffer, buffer in zip(model.buffers(), back.buffers(), strict=True):
        assert buffer.dtype == wanted_buffer.dtype
