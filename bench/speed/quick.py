"""A few ratios to plain PyTorch, half a minute in all: what bench/compare.py holds against the recorded ones.

They need no other package than the library's own, and are recorded by `make bench` (test_quick.py) at the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import best_dtype, network, pixels, sized
from peers import STEPS, plain_loop
from plain import logits_of
from racing import Race, race
from test_finetune import learnable
from test_finetune import ours as ours_in_finetuning
from test_finetune import shipped as plain_finetuning
from test_kernels import logit_pairs, pgd_in_buffers, pgd_inputs, pgd_ours
from test_pgd import batch
from test_pgd import ours as ours_in_pgd

from pbe_fast.data import ImageSet
from pbe_fast.engine.allocator import kept_heap
from pbe_fast.engine.forward import predict_logits
from pbe_fast.kernels.cosine_rank import cosine_scores

CPU = torch.device("cpu")


def cosine() -> Race:
    """The cosine of Eq. 9 against ``F.cosine_similarity``."""
    inputs = logit_pairs(sized(tiny=1_000, normal=1_000_000), 10, sets=3)
    return race(cosine_scores, F.cosine_similarity, inputs=inputs, rounds=sized(tiny=2, normal=15))


def pgd_step() -> Race:
    """The fused PGD step against the same step by PyTorch's operations, none of which allocates."""
    inputs = pgd_inputs(sized(tiny=4, normal=256), gradients=3, dtype=torch.float32)
    peer = pgd_in_buffers(torch.empty_like(inputs[0][0]))
    return race(pgd_ours, peer, inputs=inputs, rounds=sized(tiny=2, normal=31), calls=10)


def pgd() -> Race:
    """PGD-10 at width 16 against the plain float32 loop."""
    model, side = network("preact-16", "cpu")
    images, rounds = sized(tiny=4, normal=64), sized(tiny=2, normal=7)
    inputs = [batch(model, images, side, "cpu", seed=seed) for seed in range(rounds)]
    attack = ours_in_pgd(model, side, images, best_dtype("cpu"))
    return race(attack, plain_loop(model), inputs=inputs, rounds=rounds, warmup=1)


def finetuning() -> Race:
    """Fine-tuning at width 16 against the DataLoader loop."""
    model, side = network("preact-16", "cpu")
    data = learnable(sized(tiny=256, normal=1_280), side)
    return race(
        ours_in_finetuning(model, data), plain_finetuning(model, data), rounds=sized(tiny=2, normal=5), warmup=1
    )


def forward() -> Race:
    """The logits of a whole set at width 16 against a DataLoader and eager float32."""
    model, side = network("preact-16", "cpu")
    count = sized(tiny=300, normal=4_096)
    data = ImageSet(pixels(count, side, "cpu", seed=3), torch.zeros(count, dtype=torch.int64), ("a",))
    dtype = best_dtype("cpu")

    @kept_heap()
    def ours() -> object:
        return predict_logits(model, data.images, dtype=dtype)

    return race(ours, lambda: logits_of(model, data, CPU), rounds=sized(tiny=2, normal=3), warmup=1)


CASES: dict[str, Callable[[], Race]] = {
    "cosine scores of a million rows": cosine,
    "fused PGD step in place, 256 images": pgd_step,
    f"PGD-{STEPS}, width 16": pgd,
    "fine-tuning, width 16": finetuning,
    "logits of 4,096 images, width 16": forward,
}
