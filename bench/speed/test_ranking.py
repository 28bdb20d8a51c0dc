"""Ranking the training set: the first round, which asks both models, and every later one, which asks the purified one.

On a CPU 5,000 images, a tenth of CIFAR-10 (time is in proportion, see test_growth.py); 50,000 on a GPU and at the
full scale. The plain way, to the letter of Algorithm 1, asks both models in every round: a DataLoader, eager float32,
``F.cosine_similarity``, ``argsort``. Strengthened: images that rest on the device, a frozen 16-bit channels_last
compiled network, large batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from cases import DEVICES, best_dtype, flops, network, pixels, run_field, sized
from peers import Strengthened
from plain import logits_of
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.data import ImageSet
from pbe_fast.engine.allocator import kept_heap
from pbe_fast.engine.forward import predict_logits
from pbe_fast.ranking import rank_images

BATCH = 500


@DEVICES
def test_ranking(benchmark: BenchmarkFixture, device: str) -> None:
    count = sized(tiny=500, normal=5_000, full=50_000, gpu=50_000, device=device)
    infected, side = network("preact-16", device)
    purified = nudged(infected)
    data = ImageSet(pixels(count, side, device, seed=3), torch.zeros(count, dtype=torch.int64, device=device), ("a",))
    dtype = best_dtype(device)
    infected_logits = predict_logits(infected, data.images, dtype=dtype)

    @kept_heap()
    def later_round() -> Tensor:
        return rank_images(infected_logits, predict_logits(purified, data.images, dtype=dtype)).order

    @kept_heap()
    def first_round() -> Tensor:
        ours = predict_logits(infected, data.images, dtype=dtype)
        return rank_images(ours, predict_logits(purified, data.images, dtype=dtype)).order

    def plain() -> Tensor:
        where = torch.device(device)
        scores = F.cosine_similarity(logits_of(infected, data, where), logits_of(purified, data, where))
        return scores.argsort(descending=True)

    runners: dict[str, Callable[[], Tensor]] = {
        "ours, first round": first_round,
        "ours, later round": later_round,
        "plain": plain,
        "plain strengthened": strengthened(infected, purified, data, dtype),
    }
    # Values first: about the same tenth of the images, and compilation.
    last = {name: set(runner()[-count // 10 :].tolist()) for name, runner in runners.items()}
    for name, found in last.items():
        assert len(found & last["plain"]) >= 0.8 * len(found), name
    run_field(
        benchmark,
        runners,
        work=count,
        unit="images ranked/s",
        # What is needed once the infected model's logits are there.
        flops_per_unit=flops(infected, side, device),
        device=device,
        fp32=["plain"],
        promises={
            ("ours, later round", "plain"): 4.0 if dtype == torch.bfloat16 else 2.0,
            ("ours, first round", "plain strengthened"): 1.0,
            ("ours, later round", "plain strengthened"): 1.0,
        },
        rounds=sized(tiny=1, normal=3, gpu=2, device=device),
        warmup=0,
        network="preact-16",
        images=count,
        side=side,
    )


def nudged(model: nn.Module) -> nn.Module:
    """A copy with other weights of the last layer: another model, of like answers."""
    other = copy.deepcopy(model)
    linear = next(module for module in other.modules() if isinstance(module, nn.Linear))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        noise = torch.randn(linear.weight.shape, generator=generator).to(linear.weight.device)
        linear.weight.add_(0.3 * linear.weight.std() * noise)
    return other


def strengthened(infected: nn.Module, purified: nn.Module, data: ImageSet, dtype: torch.dtype) -> Callable[[], Tensor]:
    """All that the plain way gains without another algorithm."""
    models = [Strengthened(model, dtype) for model in (infected, purified)]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(part.float() / 255) for part in data.images.split(BATCH)])

    def ranked() -> Tensor:
        scores = F.cosine_similarity(*(logits(model) for model in models))
        return scores.argsort(descending=True)

    return ranked
