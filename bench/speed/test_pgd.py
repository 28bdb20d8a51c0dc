"""PGD-10 against torchattacks, Foolbox, ART and the plain loop: each as shipped and strengthened.

"ours" is `pbe_fast.attacker.PGD` as it is by default, its `refresh` included; "ours, compiled" the same with
``compile="on"``, which is what the strengthened peers, compiled as well, are measured against (but with AMX, where the
engine does not compile). All run the same steps from the same images, without a random start, so that their values can
be compared first. Where COMPILED leaves a case out nobody is compiled, except at the full scale: there is no time.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from cases import DEVICES, SCALE, best_dtype, flops, network, pixels, run_field, sized
from peers import ALPHA, EPS, PEERS, STEPS, Attack, Strengthened, plain_loop
from pytest_benchmark.fixture import BenchmarkFixture
from racing import wait_for_device
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.attacker import PGD
from pbe_fast.config import PGDConfig
from pbe_fast.engine.onednn import has_amx
from pbe_fast.engine.precision import exact_float32

CONFIG = PGDConfig(eps=EPS, alpha=ALPHA, steps=STEPS, compile="off")
STRONG = " strengthened"

# Images at a time, turns, and the least ratio to torchattacks as shipped: where bfloat16 is fast, with AMX, which needs
# more images to be busy (an update of step 1b attacks 128), and on a GPU.
CPU = {"preact-16": (64, 4, 2.8), "preact-64": (16, 3, 2.3), "resnet18": (4, 3, 1.0)}
AMX = {"preact-16": (128, 4, 2.8), "preact-64": (64, 3, 2.3), "resnet18": (8, 3, 1.0)}
GPU = {"preact-16": (2048, 5, 5.0), "preact-64": (1024, 5, 5.0), "resnet18": (128, 3, 5.0)}
COMPILED = {("preact-16", "cpu"), ("preact-64", "cpu"), ("preact-64", "cuda"), ("resnet18", "cuda")}
# The least share of the bfloat16 peak.
SHARES = {("preact-64", "cpu"): 0.80, ("preact-64", "cuda"): 0.45}


@DEVICES
@pytest.mark.parametrize("name", list(CPU))
def test_pgd(benchmark: BenchmarkFixture, name: str, device: str) -> None:
    images, rounds, least = sized(
        tiny=(4, 2, 0.0), normal=(AMX if has_amx() else CPU)[name], gpu=GPU[name], device=device
    )
    model, side = network(name, device)
    dtype = best_dtype(device)
    runners: dict[str, Attack] = {"ours": ours(model, side, images, dtype)}
    compile = SCALE == "full" or (name, device) in COMPILED
    if compile and SCALE != "tiny":
        runners["ours, compiled"] = ours(model, side, images, dtype, compile="on")
    for peer, make in PEERS.items():
        runners[peer] = make(model)
    strengthened = Strengthened(model, dtype, compile=compile)
    for peer, make in PEERS.items():
        runners[peer + STRONG] = make(strengthened)

    inputs = [batch(model, images, side, device, seed=seed) for seed in range(rounds + 1)]
    found, first_seconds = first_calls(runners, inputs[0])
    check_values(model, found, inputs[0])
    with exact_float32(torch.device(device)):
        check_steps(model, side, inputs[0])
    bf16 = dtype == torch.bfloat16
    # Compiled where the engine would compile, which it never does where oneDNN fuses by itself.
    best = "ours, compiled" if "ours, compiled" in runners and not (device == "cpu" and has_amx()) else "ours"
    promises = {("ours", peer): 1.0 for peer in PEERS} | {(best, peer + STRONG): 1.0 for peer in PEERS}
    promises["ours", "torchattacks"] = least if bf16 else 1.0
    run_field(
        benchmark,
        runners,
        inputs=inputs[1:],
        work=images * STEPS,
        unit="image-steps/s",
        # A step is a forward pass and the input's gradient.
        flops_per_unit=2 * flops(model, side, device),
        device=device,
        fp32=PEERS,
        promises=promises,
        share=SHARES.get((name, device), 0.0) if bf16 else 0.0,
        rounds=rounds,
        # The first calls above were the warm-up, also of what was compiled; a GPU's graph is captured by the fourth.
        warmup=0 if device == "cpu" else 4,
        network=name,
        images=images,
        side=side,
        steps=STEPS,
        compiled=compile,
        first_call_seconds=first_seconds,
    )


def ours(model: nn.Module, side: int, images: int, dtype: torch.dtype, **options: Any) -> Attack:
    """The attack of a run: new weights come before each call."""
    config = dataclasses.replace(CONFIG, **options)
    attack = PGD(model, config, image_shape=(3, side, side), batch_size=images, dtype=dtype)

    def call(clean: Tensor, labels: Tensor) -> Tensor:
        attack.refresh(model)
        return attack(clean, labels)

    return call


def batch(model: nn.Module, images: int, side: int, device: str, *, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh images, labelled as the model sees them: the attack starts where the loss is low."""
    clean = pixels(images, side, device, seed=100 + seed).float() / 255
    with torch.no_grad():
        return clean, model(clean).argmax(1)


def first_calls(
    runners: dict[str, Attack], arguments: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Result and seconds of each one's first call: ours, compiled, and the first strengthened peer compile there."""
    found, seconds = {}, {}
    for name, runner in runners.items():
        start = time.perf_counter()
        found[name] = runner(*arguments)
        wait_for_device()
        seconds[name] = time.perf_counter() - start
    return found, seconds


def check_values(model: nn.Module, found: dict[str, Tensor], arguments: tuple[Tensor, Tensor]) -> None:
    """All stay in the ball, and raise the loss as the plain loop does."""
    clean, labels = arguments

    def loss(images: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(images), labels))

    start = loss(clean)
    gained = loss(found["plain loop"]) - start
    assert gained > 0
    for name, adversarial in found.items():
        assert float((adversarial - clean).abs().max()) <= EPS + 1e-6, name
        assert float(adversarial.min()) >= 0 and float(adversarial.max()) <= 1, name
        # Where products are rounded to 16 bits some gradients take another sign.
        bound = 0.02 if name in PEERS or name.endswith("float32") else 0.2
        assert loss(adversarial) - start == pytest.approx(gained, rel=bound), name


def check_steps(model: nn.Module, side: int, arguments: tuple[Tensor, Tensor]) -> None:
    """In float32 ours takes the plain loop's steps: the first pixel by pixel, all of them with the same outcome.

    A gradient near zero may change its sign with the order of a sum. That moves a pixel by two steps, and every later
    step starts from there: of the first step at most one pixel in a hundred may differ.
    """
    images = len(arguments[0])
    first = ours(model, side, images, torch.float32, steps=1)(*arguments)
    moved = (first - plain_loop(model, steps=1)(*arguments)).abs() > 1e-6
    assert float(moved.double().mean()) <= 0.01
    exact = ours(model, side, images, torch.float32)(*arguments)
    check_values(model, {"plain loop": plain_loop(model)(*arguments), "ours in float32": exact}, arguments)
