"""The form of a model in which a training step on a CPU is fastest: on its own parameters and buffers."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pbe_fast.engine.rewriting import Rewriting
from pbe_fast.engine.tracing import is_untouched, trace
from pbe_fast.kernels.batch_norm import batch_norm, is_fast

_DTYPES = (torch.float32, torch.bfloat16)


class NormInTraining(nn.BatchNorm2d):
    """A batch normalisation in train mode in one pass over memory each way, with the ReLU after it.

    Args:
        norm: Weight, bias and statistics are its own, and follow the batches as its own call would have them.
        relu: Whether there is a ReLU after it.
    """

    def __init__(self, norm: nn.BatchNorm2d, *, relu: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of the input."""
        if input.dtype not in _DTYPES or input.dim() != 4:
            return F.relu(super().forward(input)) if self.relu else super().forward(input)
        y, mean, variance = batch_norm(input, self.weight, self.bias, eps=self.eps, relu=self.relu)
        self._follow(mean, variance, input.numel() // input.shape[1])
        return y

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        # The statistics kept are of the population: unbiased.
        self.running_var.mul_(1 - self.momentum).add_(variance, alpha=self.momentum * count / (count - 1))


def training_form(model: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
    """The same computation in train mode, with fewer passes over memory, where that is provably the same.

    Args:
        model: Returns logits for float images. It is only read; what is returned works on its parameters and buffers.
        image_shape: (C, H, W) of its input: on random images logits and statistics must agree.

    Returns:
        A module for train mode alone, whatever mode is asked of it. ``model`` itself where it is not on a CPU with the
        kernels for it, where its forward pass cannot be followed, and where there is nothing to be gained.
    """
    if not _has_kernels(model) or not all(is_untouched(module) for module in model.modules()):
        return model
    try:
        twin = copy.deepcopy(model).train()
        graph = _followed(twin)
        if graph is not None and _agree(twin, graph, image_shape):
            return _form(model, twin, graph) or model
    except Exception:
        # Whatever a foreign model does when it is copied or followed, it trains as it is.
        pass
    return model


def _has_kernels(model: nn.Module) -> bool:
    return is_fast() and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())


def _followed(twin: nn.Module) -> fx.Graph | None:
    names = _attributes(twin)
    before = _dice()
    graph = trace(twin)
    # What rolled dice while it was followed, as a layer that is left out at times, would not roll them any more; and a
    # tensor that arose is none of the model's.
    if graph is None or _dice() != before or _attributes(twin) != names:
        return None
    return graph


def _dice() -> tuple[object, ...]:
    _, key, *position = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), tuple(position), torch.get_rng_state().numpy().tobytes()


def _attributes(net: nn.Module) -> set[str]:
    return {f"{name}.{key}" for name, module in net.named_modules() for key in vars(module)}


def _form(model: nn.Module, twin: nn.Module, graph: fx.Graph) -> fx.GraphModule | None:
    """The rewritten graph over the parameters and buffers of ``model``, whose modes are those of ``twin``."""
    rewriting = Rewriting(model, copy.deepcopy(graph))
    found = False
    for node in rewriting.every("call_module"):
        norm = rewriting.module(node)
        if not rewriting.is_plain(node, nn.BatchNorm2d) or not twin.get_submodule(str(node.target)).training:
            continue
        if norm.running_mean is None or norm.momentum is None:
            continue
        following = next(iter(node.users)) if len(node.users) == 1 else None
        relu = following is not None and rewriting.is_relu(following)
        if following is not None and relu:
            rewriting.replace(following, node)
        rewriting.put(str(node.target), NormInTraining(norm, relu=relu))
        found = True
    if not found:
        return None
    return fx.GraphModule(_named(model, rewriting), rewriting.graph)


def _named(model: nn.Module, rewriting: Rewriting) -> dict[str, Any]:
    """What the names in the graph stand for."""
    named: dict[str, Any] = {}
    for node in rewriting.every():
        target = str(node.target)
        if node.op == "call_module":
            named[target] = rewriting.modules[target]
        elif node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            named[target] = getattr(model.get_submodule(owner), name)
    return named


def _agree(twin: nn.Module, graph: fx.Graph, image_shape: tuple[int, ...]) -> bool:
    """Whether logits, and what the buffers come to, are the same up to the rounding of float32."""
    images = torch.rand((4, *image_shape), dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    seen = []
    for formed in (False, True):
        own = copy.deepcopy(twin)
        net = _form(own, twin, graph) if formed else own
        if net is None:
            return False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            seen.append([net(images), *(buffer.float() for buffer in own.buffers())])
    return all(
        (a - b).abs().max() <= 1e-3 * a.abs().max().clamp_min(1.0) for a, b in zip(*seen, strict=True) if a.numel()
    )
