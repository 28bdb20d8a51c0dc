"""A frozen copy of a model for what never trains: the attack and the ranking."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from pbe_fast.engine.copies import deep_copy, frozen_copy, needs_planes
from pbe_fast.engine.frozen_layers import AffineReLU, FastGradConv2d, PostOpConv2d, WinogradConv2d
from pbe_fast.engine.fusing import fused, place_convolutions
from pbe_fast.engine.precision import exact_float32
from pbe_fast.engine.tracing import is_untouched, trace

# Modules whose work is a matrix product with their weight: what mixed precision computes in the short format.
_PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenCopy(nn.Module):
    """The model in eval mode, without gradients for its parameters, in the form that computes fastest.

    Batch normalisation that provably follows a convolution, and nothing else does, is folded into it; the weights of
    convolutions and linear layers are held in ``dtype``, so that no forward pass casts them. Everything else is as in
    the model, whose own ``forward`` runs, under autocast; in bfloat16 on a CPU one that `pbe_fast.engine.fusing`
    rewrote. What the copy computes in has one address for good: a CUDA graph stays valid when `refresh` brings new
    weights.

    Args:
        model: Returns logits for float images; on any device. It is not changed.
        dtype: Of the matrix products: float32, or a 16-bit format.
        image_shape: (C, H, W) of its input. Folding is tried on two random images of that shape, and given up where
            the logits change; without a shape nothing is folded.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype = torch.float32, image_shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
        self.dtype = dtype
        self._device_type = device.type
        pairs = foldable_pairs(model) if image_shape is not None else []
        self.net = frozen_copy(model, device, image_shape)
        if pairs and image_shape is not None:
            folded = _folded(self.net, model, pairs, device)
            if _agree(self.net, folded, torch.Size((2, *image_shape)), device):
                self.net = folded
            else:
                pairs = []
        self._pairs = pairs
        # Our convolutions answer in channels_last.
        if dtype == torch.bfloat16 and image_shape is not None and not needs_planes(self.net):
            self._fuse(image_shape)
        if dtype != torch.float32:
            _hold_products(self.net, dtype)
        self._own = {
            name: tensor
            for name, tensor in _state(self.net).items()
            if not any(name in (f"{conv}.weight", f"{conv}.bias") for conv, _ in pairs)
        }
        self.eval()
        self.refresh(model)

    def _fuse(self, image_shape: tuple[int, ...]) -> None:
        """Our convolutions where they are faster, and what follows them as part of them."""
        place_convolutions(self.net)
        net = fused(deep_copy(self.net))
        device = torch.device(self._device_type)
        if net is not None and _agree(self.net, net, torch.Size((2, *image_shape)), device):
            self.net = net

    @property
    def folded(self) -> tuple[tuple[str, str], ...]:
        """Names of the (convolution, batch normalisation) pairs that became one convolution."""
        return tuple(self._pairs)

    @property
    def has_post_ops(self) -> bool:
        """Whether convolutions are oneDNN's with what follows them; compiled, they are plain ones again."""
        return any(isinstance(module, PostOpConv2d) for module in self.net.modules())

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Takes the current weights and BN statistics of ``model``, the one copied or another of its architecture."""
        state = _state(model)
        # Lists of one dtype each: others are copied tensor by tensor on a GPU.
        alike: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for name, own in self._own.items():
            targets, sources = alike.setdefault((own.dtype, state[name].dtype), ([], []))
            targets.append(own)
            sources.append(state[name])
        for targets, sources in alike.values():
            torch._foreach_copy_(targets, sources)
        for conv, norm in self._pairs:
            _fold_into(self.net.get_submodule(conv), model.get_submodule(conv), model.get_submodule(norm))
        for module in self.net.modules():
            if isinstance(module, (WinogradConv2d, FastGradConv2d, PostOpConv2d, AffineReLU)):
                module.refresh()

    def forward(self, images: Tensor) -> Tensor:
        """What the model returns for float images (B, C, H, W)."""
        # No cache: what autocast keeps of one pass would be stale, or of a graph's memory, in the next.
        enabled = self.dtype != torch.float32
        with torch.autocast(self._device_type, dtype=self.dtype, enabled=enabled, cache_enabled=False):
            out: Tensor = self.net(images)
        return out


def foldable_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions with the batch normalisation that alone takes their output, each called once.

    The model's ``forward`` is followed symbolically, on a copy. Where it decides by the values or the sizes of tensors,
    or rolls dice, that cannot be done, and there are no pairs. Modules of derived types, with hooks, or known under two
    names are left alone.
    """
    try:
        traced = deep_copy(model).eval()
    except Exception:
        return []
    graph = trace(traced)
    if graph is None:
        return []
    modules = dict(traced.named_modules())
    names = Counter(id(module) for _, module in traced.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    touched = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def plain(name: str, types: tuple[type, ...]) -> bool:
        module = modules[name]
        return (
            type(module) in types
            and names[id(module)] == 1
            and calls[name] == 1
            and name not in touched
            and is_untouched(module)
        )

    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not plain(str(node.target), _NORMS):
            continue
        source = node.args[0] if node.args else None
        follows = isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1
        has_statistics = modules[str(node.target)].running_mean is not None
        if follows and has_statistics and plain(str(source.target), _CONVOLUTIONS):  # type: ignore[union-attr]
            pairs.append((str(source.target), str(node.target)))  # type: ignore[union-attr]
    return pairs


def _folded(frozen: nn.Module, model: nn.Module, pairs: list[tuple[str, str]], device: torch.device) -> nn.Module:
    net = frozen_copy(frozen, device)
    for conv, norm in pairs:
        target = net.get_submodule(conv)
        weight = target.get_parameter("weight")
        target.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
        target.bias = nn.Parameter(weight.new_empty(weight.shape[0]), requires_grad=False)
        with torch.no_grad():
            _fold_into(target, model.get_submodule(conv), model.get_submodule(norm))
        net.set_submodule(norm, nn.Identity())
    return net


def _fold_into(target: nn.Module, conv: nn.Module, norm: nn.Module) -> None:
    """gamma (W x + b - mu) / sqrt(var + eps) + beta, as the weight and bias of one convolution."""
    assert isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _NORMS)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance.float() + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    shift = -mean * scale if conv.bias is None else (conv.bias - mean) * scale
    if norm.affine:
        shift = shift + norm.bias
    target.get_parameter("weight").copy_(conv.weight * scale.view(-1, *[1] * (conv.weight.dim() - 1)))
    target.get_parameter("bias").copy_(shift)


def _agree(net: nn.Module, folded: nn.Module, shape: torch.Size, device: torch.device) -> bool:
    """Whether two models give two random images the same logits and gradients, up to the rounding of float32.

    TF32's would be larger than what is looked for: a ResNet-18 of random weights would not be folded.
    """
    images = torch.rand(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(device)
    seen = []
    try:
        for model in (net, folded):
            with torch.enable_grad(), exact_float32(device):
                leaf = images.clone().requires_grad_()
                logits = model(leaf)
                (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
            seen.append((logits.detach(), gradient))
    except Exception:
        # Of a forward that asks an attribute of the batch normalisation that is no longer there, for one; or of one
        # that has no gradient.
        return False
    (expected, gradient), (got, own) = seen
    if not bool((expected - got).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1.0)):
        return False
    # A ReLU may fall to the other side of zero.
    return bool((gradient - own).norm() <= 0.05 * gradient.norm())


def _hold_products(net: nn.Module, dtype: torch.dtype) -> None:
    """Weights and biases of plain products in ``dtype``; a parameter that two modules share stays as it is."""
    owners = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    for module in net.modules():
        if type(module) in _PRODUCTS and is_untouched(module):
            for parameter in module.parameters(recurse=False):
                if owners[id(parameter)] == 1:
                    parameter.data = parameter.data.to(dtype)


def _state(model: nn.Module) -> dict[str, Tensor]:
    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield from model.named_parameters(remove_duplicate=False)
        yield from model.named_buffers(remove_duplicate=False)

    return dict(pairs())
