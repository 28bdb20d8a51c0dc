from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pbe_fast.engine.copies import deep_copy, frozen_copy, in_planes, needs_planes, restored


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


class Flattens(nn.Module):
    """Flattens its feature maps by ``view``, which channels_last does not allow, as tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        logits: Tensor = self.linear(maps.view(maps.shape[0], -1))
        return logits


def test_a_model_that_flattens_by_view_is_fed_planes() -> None:
    model = Flattens()
    images = torch.rand(2, 3, 6, 6)
    worked_on = frozen_copy(model, torch.device("cpu"), (3, 6, 6))
    again = frozen_copy(worked_on, torch.device("cpu"))
    for copied in (worked_on, again, copy.deepcopy(worked_on)):
        assert needs_planes(copied)
        torch.testing.assert_close(copied(images.contiguous(memory_format=torch.channels_last)), model(images))
    back = restored(worked_on, model)
    assert not back._forward_pre_hooks
    torch.testing.assert_close(back(images), model(images))


def test_trying_it_draws_nothing_and_counts_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).train()
    model.register_forward_hook(lambda *_: torch.rand(1))
    before = torch.get_rng_state()
    copied = frozen_copy(model, torch.device("cpu"), (3, 6, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert not needs_planes(copied)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), copied.buffers(), strict=True))


def test_what_a_forward_pass_has_left_behind_is_copied_by_value() -> None:
    model = nn.Linear(3, 2)
    logits = model(torch.rand(4, 3))
    model.last, model.all = logits, {"logits": [logits]}  # type: ignore[assignment]
    copied = deep_copy(model)
    assert torch.equal(copied.last, logits)  # type: ignore[arg-type]
    assert copied.last is copied.all["logits"][0]  # type: ignore[index]
    assert copied.last.grad_fn is None and model.last is logits


def test_planes_of_one_channel() -> None:
    images = torch.rand(2, 1, 6, 5).contiguous(memory_format=torch.channels_last)
    assert in_planes(images).stride() == (30, 30, 5, 1)
    assert torch.equal(in_planes(images), images)
