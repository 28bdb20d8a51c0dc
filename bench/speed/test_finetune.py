"""An epoch of fine-tuning against a DataLoader loop with torchvision's transforms, as shipped and strengthened.

The epoch is that of an extra set of 2,560 images (20,000 on a GPU), batches of 128, random crops, mirrored images,
width 16 on a CPU and 64 on a GPU.
"As shipped" is what the scripts of backdoor defences do: PIL pictures, eager float32, ``loss.item()`` in every step.
"Strengthened" keeps its workers, and has channels_last, 16-bit products, fused SGD and a compiled network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import SEED, best_dtype, compiled, flops, network, pixels, run_field, sized
from plain import WORKERS, sgd, train_epoch, training_loader
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.config import FineTuneConfig
from pbe_fast.data import ImageSet
from pbe_fast.finetune import FineTuner, steps_per_epoch

CONFIG = FineTuneConfig(lr=0.01, augment="crop+flip", distill_weight=0.0)


@pytest.mark.parametrize(
    ("name", "device"), [("preact-16", "cpu"), pytest.param("preact-64", "cuda", marks=pytest.mark.gpu)]
)
def test_finetuning_epoch(benchmark: BenchmarkFixture, name: str, device: str) -> None:
    count = sized(tiny=256, normal=2_560, gpu=20_000, device=device)
    model, side = network(name, device)
    data = learnable(count, side)
    runners = {
        "ours": ours(model, data.to(device)),
        "DataLoader": shipped(model, data),
        "DataLoader strengthened": strengthened(model, data, best_dtype(device)),
    }
    # Values first: the first epoch of each, which also compiles, brings down the loss alike.
    losses = {name: runner() for name, runner in runners.items()}
    for peer, loss in losses.items():
        assert loss == pytest.approx(losses["ours"], rel=0.25), (peer, losses)
    bf16 = best_dtype(device) == torch.bfloat16
    run_field(
        benchmark,
        runners,
        work=count,
        unit="images/s",
        flops_per_unit=3 * flops(model, side, device),
        device=device,
        fp32=["DataLoader"],
        promises={
            ("ours", "DataLoader"): 3.0 if bf16 else 1.0,
            ("ours", "DataLoader strengthened"): 1.0,
        },
        share=0.40 if device == "cuda" else 0.0,
        rounds=sized(tiny=1, normal=3, gpu=2, device=device),
        # The epochs above warmed up.
        warmup=0,
        network=name,
        images=count,
        side=side,
        workers=WORKERS,
        first_epoch_losses=losses,
    )


def learnable(count: int, side: int) -> ImageSet:
    """Noise whose colours say the label: something that every loop learns in an epoch."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(10, (count,), generator=generator)
    images = pixels(count, side, "cpu", seed=SEED) // 2
    tints = torch.randint(0, 128, (10, 3, 1, 1), generator=generator, dtype=torch.uint8)
    return ImageSet(images + tints[labels], labels, tuple("0123456789"))


def ours(model: nn.Module, data: ImageSet) -> Callable[[], float]:
    """`FineTuner` on images that rest on the device."""
    trained = copy.deepcopy(model).to(memory_format=torch.channels_last)
    steps = steps_per_epoch(len(data), CONFIG.batch_size)
    tuner = FineTuner(
        trained,
        CONFIG,
        total_steps=1_000 * steps,
        generator=torch.Generator().manual_seed(SEED),
        dtype=best_dtype(data.device.type),
    )
    return lambda: tuner.run(data, steps=steps)


def shipped(model: nn.Module, data: ImageSet) -> Callable[[], float]:
    """The plain loop."""
    trained = copy.deepcopy(model)
    device = next(trained.parameters()).device
    loader = training_loader(data, CONFIG)
    optimizer = sgd(trained, CONFIG)
    return lambda: train_epoch(trained, loader, optimizer, device)


def strengthened(model: nn.Module, data: ImageSet, dtype: torch.dtype) -> Callable[[], float]:
    """The same loader, and everything around it that a user can switch on."""
    trained = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    device = next(trained.parameters()).device
    loader = training_loader(data, CONFIG, persistent_workers=True, pin_memory=device.type == "cuda")
    optimizer = sgd(trained, CONFIG, fused=True)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = trained(images)
        return F.cross_entropy(logits.float(), labels)

    fast_loss = compiled(loss_of)

    def epoch() -> float:
        total, batches = torch.zeros((), device=device), 0
        for images, labels in loader:
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            loss = fast_loss(images, labels.to(device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            batches += 1
        return float(total) / batches

    return epoch
