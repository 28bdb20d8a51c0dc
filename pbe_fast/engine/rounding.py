"""Whether a model's convolutions in bfloat16 are right on this processor: some are not (docs/engine.md)."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pbe_fast.engine.copies import deep_copy
from pbe_fast.engine.precision import resolve_precision
from pbe_fast.errors import PBEWarning

# As many images as an update or a step of the attack has: oneDNN takes other code for few.
_BATCH = 128
# Different ones of these: float32 takes its time.
_DRAWN = 4
# Of the norm. Rounding makes 0.002, what is wrong is off by more than the outputs.
_TOLERANCE = 0.05
_CONVOLUTION = torch.ops.aten.convolution.default


def precision_for(
    model: nn.Module, image_shape: tuple[int, ...], *, device: torch.device, requested: str = "auto"
) -> torch.dtype:
    """`resolve_precision`, unless this processor gets the model's convolutions wrong in bfloat16.

    Args:
        model: Returns logits for float images (B, C, H, W); it may be on another device, and is not changed.
        image_shape: (C, H, W).
        device: Where the model will be computed.
        requested: "auto", "fp32" or "bf16".

    Returns:
        The dtype of the matrix products. For "auto", float32 where bfloat16 is wrong, with a `PBEWarning`; for "bf16"
        what was asked for, with the warning.
    """
    dtype = resolve_precision(device, requested)
    if dtype != torch.bfloat16 or device.type != "cpu":
        return dtype
    wrong = wrong_convolutions(model, image_shape)
    if not wrong:
        return dtype
    some = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    what = "float32 is used" if requested == "auto" else "as bfloat16 was asked for (fp32 is right)"
    warnings.warn(f"wrong in bfloat16 on this processor, {what}: {some}", PBEWarning, stacklevel=2)
    return torch.float32 if requested == "auto" else dtype


def wrong_convolutions(model: nn.Module, image_shape: tuple[int, ...]) -> list[str]:
    """Those of a model that the CPU gets wrong in bfloat16, each kind once, in words.

    Every kind (of size, channels, stride and the like) that two images meet on their way is computed on random values,
    of as many images as a batch has, and compared with float32.
    """
    # Its forward pass may change what a model holds.
    tried = _uncompiled(deep_copy(model)).to("cpu", torch.float32).eval()
    recorder = _Convolutions()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder:
        tried(torch.zeros(2, *image_shape, dtype=torch.float32))
    return [_in_words(*kind) for kind in recorder.kinds if _is_wrong(*kind)]


def _uncompiled(model: nn.Module) -> nn.Module:
    """``model`` without torch.compile, in place: two images are not worth compiling for."""
    # Not torch.compiler.set_stance, which other threads would meet as well.
    for module in model.modules():
        module._compiled_call_impl = None
        for name, child in module._modules.items():
            module._modules[name] = getattr(child, "_orig_mod", child)
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


class _Convolutions(TorchDispatchMode):
    """Keeps what kinds of convolutions are called: (input shape, weight shape, the arguments after the bias)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[tuple[Any, ...], None] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _CONVOLUTION:
            how = tuple(tuple(each) if isinstance(each, list) else each for each in args[3:])
            self.kinds[tuple(args[0].shape[1:]), tuple(args[1].shape), how] = None
        return func(*args, **(kwargs or {}))


@functools.cache
def _is_wrong(shape: tuple[int, ...], weight_shape: tuple[int, ...], how: tuple[Any, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_DRAWN, *shape), generator=generator).bfloat16()
    weight = torch.randn(weight_shape, generator=generator).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.convolution(x.float(), weight.float(), None, *how)
        many = x.repeat(_BATCH // _DRAWN, *(1 for _ in shape))
        if many.ndim == 4:
            many, weight = (each.contiguous(memory_format=torch.channels_last) for each in (many, weight))
        got = torch.convolution(many, weight, None, *how).float().unflatten(0, (-1, _DRAWN))
    # NaN is no small difference.
    return not bool((got - expected).norm() <= _TOLERANCE * math.sqrt(len(got)) * expected.norm())


def _in_words(shape: tuple[int, ...], weight_shape: tuple[int, ...], how: tuple[Any, ...]) -> str:
    def size(values: tuple[int, ...]) -> str:
        return " x ".join(map(str, values))

    return (
        f"a convolution of {shape[0]} channels of {size(shape[1:])} with a kernel of {size(weight_shape[2:])} and "
        f"stride {size(how[0])}"
    )
