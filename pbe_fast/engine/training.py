"""The form of a model in which a training step on a CPU is fastest: on its own parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pbe_fast.engine.copies import deep_copy
from pbe_fast.engine.frozen_layers import can_have_post_ops, in_bfloat16
from pbe_fast.engine.onednn import has_amx
from pbe_fast.engine.rewriting import Rewriting
from pbe_fast.engine.side_by_side import SharingConv2d, conv2d, row_of
from pbe_fast.engine.tracing import is_untouched, trace
from pbe_fast.kernels.batch_norm import batch_norm, batch_norm_and, is_fast

_DTYPES = (torch.float32, torch.bfloat16)
# What autocast computes in the short format.
_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")


class NormInTraining(nn.BatchNorm2d):
    """A batch normalisation in train mode in one pass over memory each way, with the ReLU after it.

    Args:
        norm: Weight, bias and statistics are its own, and follow the batches as its own call would have them.
        relu: Whether there is a ReLU after it.

    Attributes:
        passes_on: Whether `forward` also returns its input, for the one other reader: both gradients become one.
    """

    def __init__(self, norm: nn.BatchNorm2d, *, relu: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.relu = relu
        self.passes_on = False

    def forward(self, input: Tensor) -> Any:
        """In the dtype of the input."""
        if input.dtype not in _DTYPES or input.dim() != 4:
            y = F.relu(super().forward(input)) if self.relu else super().forward(input)
            return (y, input) if self.passes_on else y
        if self.passes_on:
            y, mean, variance, same = batch_norm_and(input, self.weight, self.bias, eps=self.eps, relu=self.relu)
        else:
            y, mean, variance = batch_norm(input, self.weight, self.bias, eps=self.eps, relu=self.relu)
        self._follow(mean, variance, input.numel() // input.shape[1])
        return (y, same) if self.passes_on else y

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        # The statistics kept are of the population: unbiased.
        self.running_var.mul_(1 - self.momentum).add_(variance, alpha=self.momentum * count / (count - 1))


class ConvInTraining(SharingConv2d):
    """A convolution whose small images lie side by side, where AMX multiplies.

    Args:
        conv: A plain one, with zeros around its images; weight and bias are its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """In bfloat16 where autocast would have it so, in float32 elsewhere."""
        row = row_of(input.shape, self.geometry, self.kernel_size) if in_bfloat16(input) else None
        if row is None:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return conv2d(input.to(torch.bfloat16), self.weight.to(torch.bfloat16), bias, self.geometry, row)


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
        twin = deep_copy(model).train()
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
    before = _attributes(twin)
    graph = trace(twin)
    # What counted its calls while it was followed would not count any more; a tensor that arose is none of the model's.
    return graph if _attributes(twin) == before else None


def _attributes(net: nn.Module) -> dict[str, object]:
    """The names of all that the modules hold, and the values of what is plain."""
    return {
        f"{name}.{key}": value if isinstance(value, str | int | float | None) else None
        for name, module in net.named_modules()
        for key, value in vars(module).items()
    }


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
    for node in rewriting.every("call_module"):
        other = rewriting.other_reader(node) if rewriting.is_plain(node, NormInTraining) else None
        if other is not None and rewriting.is_add(other):
            rewriting.pass_on(node, other)
    for node in rewriting.every("call_module") if has_amx() else ():
        if rewriting.is_plain(node, nn.Conv2d) and can_have_post_ops(rewriting.module(node)):
            rewriting.put(str(node.target), ConvInTraining(rewriting.module(node)))
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
    """Whether a step does the same to both: logits, buffers and gradients up to rounding, products in the same dtypes.

    What forward does beside calling modules and functions is not in the graph: where it takes no gradient, or one of
    its own, or none of autocast, a model cannot be followed.
    """
    exact = [_seen(net, own, image_shape) for net, own in _both(twin, graph)]
    if not _close(exact[0].values, exact[1].values, 1e-3) or not _close(exact[0].grads, exact[1].grads, 0.05):
        return False
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        own, formed = (_seen(net, own, image_shape).products for net, own in _both(twin, graph))
    return own == formed


class _Seen(NamedTuple):
    """Of a forward and a backward pass."""

    # Logits, and what the buffers come to.
    values: list[Tensor]
    # Of the parameters.
    grads: list[Tensor | None]
    products: list[tuple[str, torch.dtype]]


class _Products(TorchDispatchMode):
    """Notes in which dtypes products are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            self.seen.append((name, next(a.dtype for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


def _both(twin: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A copy, and the form of another one with that copy."""
    plain, other = deep_copy(twin), deep_copy(twin)
    yield plain, plain
    yield _form(other, twin, graph) or other, other


def _seen(net: nn.Module, own: nn.Module, image_shape: tuple[int, ...]) -> _Seen:
    images = torch.rand((4, *image_shape), dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    own.requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _Products() as products:
        # Not torch.manual_seed, which would seed GPUs as well.
        torch.default_generator.manual_seed(0)
        logits = net(images).float()
        logits.square().mean().backward()
    values = [logits.detach(), *(buffer.float() for buffer in own.buffers())]
    return _Seen(values, [parameter.grad for parameter in own.parameters()], products.seen)


def _close(some: Sequence[Tensor | None], others: Sequence[Tensor | None], tolerance: float) -> bool:
    """Whether each is about its counterpart, and none is missing on one side only."""
    if any((a is None) != (b is None) for a, b in zip(some, others, strict=True)):
        return False
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a is not None and b is not None and a.numel()]
    # A bias before a normalisation has no gradient but rounding.
    least = max((float(a.norm()) for a, _ in pairs), default=0.0) * 1e-3
    return all(float((a - b).norm()) <= tolerance * max(float(a.norm()), least) for a, b in pairs)
