"""Random arguments of a step of PGD."""

from __future__ import annotations

import math
from typing import Any

import torch

NORMS = ("linf", "l2")


def case(
    shape: tuple[int, ...],
    *,
    seed: int,
    grad_dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    normalised: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Random images inside of [0, 1] and off the origin, with some pixels at the borders."""
    generator = torch.Generator().manual_seed(seed)
    origin = torch.rand(shape, generator=generator).mul(1.2).sub(0.1).clamp(0, 1)
    adv = (origin + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator) * 10 ** torch.empty(shape[0], 1, 1, 1).uniform_(-3, 3)
    tensors = {"adv": adv, "grad": grad.to(grad_dtype), "origin": origin}
    arguments: dict[str, Any] = {k: v.to(device).contiguous(memory_format=layout) for k, v in tensors.items()}
    if normalised:
        arguments["mean"] = torch.rand(shape[1], generator=generator).to(device)
        arguments["std"] = (torch.rand(shape[1], generator=generator) * 0.5 + 0.1).to(device)
    return arguments


def sizes(norm: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Steps that leave some pixels (or images) inside of the ball and push others out of it."""
    scale = 1.0 if norm == "linf" else math.sqrt(math.prod(shape[1:]))
    return {"norm": norm, "eps": 0.05 * scale, "alpha": 0.02 * scale}
