"""Runs beside other threads of the process."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from pbe_fast.config import FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.models import SmallCNN
from pbe_fast.purify import purify
from pbe_fast.result import PurifyResult

SHAPE = (1, 8, 8)
CONFIG = PurifyConfig(
    pgd=PGDConfig(eps=0.05, steps=1),
    finetune=FineTuneConfig(batch_size=32, augment="none"),
    adversarial_steps=4,
    clean_steps=2,
    clean_epochs=0,
    initial="random",
    fractions=(0.5,),
)


def data() -> ImageSet:
    images = torch.randint(0, 256, (64, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(64) % 4, tuple("abcd"))


def run(model: nn.Module) -> PurifyResult:
    return purify(model, data(), config=CONFIG, device="cpu", precision="fp32", progress=False)


def weights(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def test_two_runs_at_a_time_give_what_each_gives_alone() -> None:
    models = [SmallCNN(4, width=2) for _ in range(2)]
    alone = [weights(run(model).model) for model in models]
    results: dict[int, list[Tensor]] = {}

    def purify_one(number: int) -> None:
        # torch holds the number of threads by thread.
        torch.set_num_threads(1)
        results[number] = weights(run(models[number]).model)

    for _ in range(3):
        results.clear()
        threads = [threading.Thread(target=purify_one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, expected in enumerate(alone):
            # Not bit for bit: a run that sees dice rolled while it follows its model takes another form of it.
            torch.testing.assert_close(results[number], expected, rtol=1e-3, atol=1e-4)
