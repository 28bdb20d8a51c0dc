"""What a run needs beside its data: counted tensor by tensor, so that it does not depend on an allocator."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine import forward
from pbe_fast.finetune import FineTuner
from pbe_fast.models import PreActResNet18
from pbe_fast.purify import purify

BATCH = 64


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In-place operations and views return what is known already, or what was there before.
        given = {id(s) for s in self._storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if id(storage) not in self._known and id(storage) not in given:
                size = storage.nbytes()
                self._known.add(id(storage))
                self.now += size
                weakref.finalize(storage, self._gone, id(storage), size)
        self.peak = max(self.peak, self.now)
        return out

    @staticmethod
    def _storages(values: Any) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _data(n: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (n,), generator=generator), tuple("abcd"))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return PreActResNet18(4, width=4)


def _activations(images: int) -> int:
    """What a forward pass keeps for the backward pass."""
    model = _network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.rand(images, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with LiveBytes() as count:
        loss = F.cross_entropy(model(batch), torch.zeros(images, dtype=torch.int64))
        held = count.now
        loss.backward()
    return held


def test_storages_are_counted_while_they_live() -> None:
    with LiveBytes() as count:
        a = torch.zeros(1000)
        b = a.view(10, 100).add_(1)
        assert count.now == 4000
        c = (b * 2).relu()
        assert (count.now, count.peak) == (8000, 12000)
        del a, c
        assert count.now == 4000
        del b
        assert count.now == 0


@pytest.mark.parametrize("with_clean_set", [False, True])
@pytest.mark.parametrize("mix", [False, True])
def test_a_run_needs_its_data_and_a_little_more_than_the_activations_of_one_batch(
    monkeypatch: pytest.MonkeyPatch, with_clean_set: bool, mix: bool
) -> None:
    # Ranked at once are 512 images where memory matters most, four times the batch of fine-tuning: here the whole set.
    monkeypatch.setattr(forward, "has_amx", lambda: True)
    data = _data(4 * BATCH)
    # Adversarial batches that are mixed hold twice as many images.
    one_batch = _activations((1 + mix) * BATCH)
    config = PurifyConfig(
        pgd=PGDConfig(steps=2),
        finetune=FineTuneConfig(lr=1e-3, batch_size=BATCH, augment="crop+flip", mix_clean=mix),
        # One of each turn.
        adversarial_steps=len(PurifyConfig().attacks),
        clean_steps=2,
        clean_epochs=0,
        fractions=(0.5, 1.0),
    )
    with LiveBytes() as count:
        purify(
            _network(),
            data,
            clean_data=data if with_clean_set else None,
            config=config,
            device="cpu",
            precision="fp32",
            progress=False,
        )
    # The data themselves rest where they were.
    assert count.peak < 2.5 * one_batch


def test_what_a_fine_tuner_holds_goes_with_it() -> None:
    model = _network()
    tuner = FineTuner(model, FineTuneConfig(batch_size=8), total_steps=2, generator=torch.Generator())
    tuner.run(_data(16), steps=1)
    tuner.run(_data(16), steps=1, attack=PGDConfig(steps=1))
    gone = weakref.ref(tuner)
    gc.disable()
    try:
        del tuner
        assert gone() is None
    finally:
        gc.enable()
