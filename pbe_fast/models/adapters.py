"""Looking into any classifier: its last linear layer and the features that enter it, its stages, its BN layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbe_fast.errors import InputError


def last_linear(model: nn.Module) -> nn.Linear:
    """The last ``nn.Linear`` in the order of registration, which in classifiers is the one that makes the logits.

    Raises:
        InputError: There is none.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(
            "model without a linear layer", got=type(model).__name__, accepted="one whose head is nn.Linear"
        )
    return linears[-1]


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features: the input of the model's last linear layer.

    The model runs as it is, in its own train or eval mode, with gradients if they are on; the hook that listens is
    gone afterwards, also after an error.

    Args:
        model: A classifier with an ``nn.Linear`` as its head.
        images: (B, C, H, W), as the model takes them.

    Returns:
        (B, F), the dtype of the head's input.

    Raises:
        InputError: No linear layer, one that the forward pass does not reach, or one whose input is not (B, F).
    """
    seen: list[Tensor] = []

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["input"])

    hook = last_linear(model).register_forward_pre_hook(listen, with_kwargs=True)
    try:
        model(images)
    finally:
        hook.remove()
    if not seen or seen[-1].ndim != 2 or seen[-1].shape[0] != images.shape[0]:
        raise InputError(
            f"features of {type(model).__name__}",
            got=f"{tuple(seen[-1].shape)} at the last linear layer" if seen else "a last linear layer that is not used",
            accepted="(B, F) at the last linear layer",
        )
    return seen[-1]


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Listen to modules while the context lasts: a dict that each forward pass fills with their last outputs.

    Outputs that are no tensors are left out. The keys are in the order in which the modules finished.
    """
    outputs: dict[str, Tensor] = {}

    def listen(name: str, _: nn.Module, __: Any, output: Any) -> None:
        outputs.pop(name, None)
        if isinstance(output, Tensor):
            outputs[name] = output

    hooks = [model.get_submodule(name).register_forward_hook(partial(listen, name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def conv_stages(model: nn.Module, images: Tensor, count: int) -> list[str]:
    """Names of the modules that end the last ``count`` stages, found by the height and width of their outputs.

    A stage is what works at one height and width. The outermost modules that show enough stages are taken, so that of a
    ResNet it is the blocks ("layer2" to "layer4") and not the layers within them. Single pixels are no stage.

    Args:
        model: In eval mode, on the device of the images.
        images: (B, C, H, W), as the model takes them.
        count: At most so many.

    Returns:
        In the order of the forward pass; fewer where there are fewer stages.

    Raises:
        InputError: No module has such an output.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    with outputs_of(model, modules) as outputs, torch.no_grad():
        model(images)
    sizes: dict[str, torch.Size] = {}
    for name, out in outputs.items():
        # Not what is larger than before: pooling to a fixed size enlarges small maps.
        if out.ndim == 4 and 1 < out.shape[2:].numel() <= min((s.numel() for s in sizes.values()), default=math.inf):
            sizes[name] = out.shape[2:]
    depths = {name: name.count(".") + 1 for name in modules}
    best: list[str] = []
    for depth in range(1, max(depths.values(), default=0) + 1):
        outermost = [n for n in sizes if depths[n] == depth or (depths[n] < depth and not any(modules[n].children()))]
        ends = {sizes[name]: name for name in outermost}
        # A later module of the same size replaces an earlier one; the order is that of the forward pass.
        found = [name for name in outermost if ends[sizes[name]] == name][-count:]
        best = found if len(found) > len(best) else best
    if not best:
        raise InputError(
            f"stages of {type(model).__name__}",
            got="no module whose output is (B, C, H, W)",
            accepted="a convolutional network",
        )
    return best


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch-normalisation layers with a weight and a bias, by name.

    Raises:
        InputError: There are none.
    """
    layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    if not layers:
        raise InputError(
            "model without batch normalisation", got=type(model).__name__, accepted="one with affine BatchNorm layers"
        )
    return layers
