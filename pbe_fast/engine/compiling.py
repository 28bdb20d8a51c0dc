"""``torch.compile``, where the work that is left outweighs what compiling costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bargain:
    """What compiling a network for one batch size costs, and how much faster its attack then is (docs/engine.md)."""

    seconds: float
    speedup: float


# Measured for PreActResNet-18 on a CPU with AVX512-BF16, where oneDNN does most of the work either way.
_BARGAINS = {"cpu": Bargain(60.0, 1.07), "cuda": Bargain(60.0, 1.2)}


def worth_compiling(seconds: float, device: torch.device) -> bool:
    """Whether ``seconds`` of work that are left, uncompiled, are shortened by twice what compiling takes."""
    bargain = _BARGAINS.get(device.type)
    return bargain is not None and seconds * (1 - 1 / bargain.speedup) > 2 * bargain.seconds


def compiled(network: nn.Module, try_out: Callable[[Forward], object]) -> Forward | None:
    """``network`` compiled for one batch size; None, with a warning, where it fails or there is no compiler.

    Args:
        network: With frozen parameters: of others the compiled backward pass would compute the gradients, too.
        try_out: Uses what it is given as it will be used later. Compilation happens in there.
    """
    forward: Forward = torch.compile(network, dynamic=False)
    try:
        try_out(forward)
    except Exception as error:
        # The compiler's errors are of many types; without it everything works, only slower.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the attack runs without torch.compile: {reason}", RuntimeWarning, stacklevel=3)
        return None
    return forward
