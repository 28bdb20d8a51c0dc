"""What follows a convolution, done as part of it: ReLU, the sum with a residual, a batch normalisation before a ReLU.

The forward pass of the model is followed symbolically, and rewritten where that is provably the same.
"""

from __future__ import annotations

import operator
from collections import Counter

from torch import fx, nn

from pbe_fast.engine.frozen_layers import (
    AffineReLU,
    BesideConv2d,
    FastGradConv2d,
    PostOpConv2d,
    WinogradConv2d,
    can_be_beside,
    can_be_winograd,
    can_have_fast_grad,
    can_have_post_ops,
    has_fast_convolutions,
    has_post_ops,
)
from pbe_fast.engine.rewriting import IN_PLACE_SUMS, Rewriting
from pbe_fast.engine.tracing import is_untouched, trace

_CONVOLUTIONS = (WinogradConv2d, FastGradConv2d, PostOpConv2d)


def place_convolutions(net: nn.Module) -> None:
    """Puts the faster convolutions in the place of those that can be; with hooks, or two names, they are left alone."""
    names = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    devices = {parameter.device for parameter in net.parameters()}
    own = all(has_fast_convolutions(device) for device in devices)
    if not own and not all(has_post_ops(device) for device in devices):
        return
    for name, module in list(net.named_modules()):
        if not name or names[id(module)] > 1 or not isinstance(module, nn.Conv2d) or not is_untouched(module):
            continue
        if not own:
            if can_have_post_ops(module):
                net.set_submodule(name, PostOpConv2d(module))
        elif can_be_winograd(module):
            net.set_submodule(name, WinogradConv2d(module))
        elif can_have_fast_grad(module):
            net.set_submodule(name, FastGradConv2d(module))


def fused(net: nn.Module) -> nn.Module | None:
    """The same computation with fewer passes over memory, on the same parameters and buffers.

    Args:
        net: In eval mode, after `place_convolutions`. Its modules are changed and not to be used any more, except where
            None is returned.

    Returns:
        A module of the same parameters and buffers under the same names; None where ``forward`` cannot be followed or
        rolls dice, or there is nothing to be gained.
    """
    if not any(isinstance(module, _CONVOLUTIONS) for module in net.modules()):
        return None
    graph = trace(net, leaves=_CONVOLUTIONS)
    if graph is None:
        return None
    rewriting = _Rewriting(net, graph)
    rewriting.run()
    return fx.GraphModule(net, graph).eval()


class _Rewriting(Rewriting):
    def run(self) -> None:
        for node in self.every("call_module"):
            if type(self.module(node)) is nn.Identity and node.args:
                self.replace(node, node.args[0])
        for node in self.every():
            if self.is_relu(node):
                self._fuse_relu(node)
        for node in self.every():
            if self.is_add(node):
                self._fuse_add(node)
        for node in self.every("call_module"):
            if self.is_plain(node, FastGradConv2d):
                self._pair(node)
        for node in self.every("call_module"):
            if self._is_conv(node) or self.is_plain(node, AffineReLU):
                self._pass_on(node)
        self.graph.lint()

    def _fuse_relu(self, node: fx.Node) -> None:
        source = self.alone(node.args[0])
        if source is None:
            return
        if self._is_conv(source) or self.is_plain(source, FastGradConv2d):
            self.module(source).relu = True
            self.replace(node, source)
        elif self.is_add(source):
            conv = self._fuse_add(source)
            if conv is not None:
                self.module(conv).relu = True
                self.replace(node, conv)
        elif self._is_norm(source):
            name = str(source.target)
            self.put(name, AffineReLU(self.module(source)))
            self.net.set_submodule(name, self.modules[name])
            self.replace(node, source)

    def _fuse_add(self, node: fx.Node) -> fx.Node | None:
        """The sum of a convolution's output and something else, as one call where the sum was."""
        for this, other in ((0, 1), (1, 0)):
            conv = self.alone(node.args[this])
            # In place, the sum changes what else its first operand is used for.
            if conv is None or not self._is_conv(conv) or (this == 1 and node.target in IN_PLACE_SUMS):
                continue
            if len(conv.args) > 1 or self.module(conv).relu or conv is node.args[other]:
                continue
            with self.graph.inserting_before(node):
                both = self.graph.call_module(str(conv.target), (conv.args[0], node.args[other]))
            self.replace(node, both)
            self.graph.erase_node(conv)
            return both
        return None

    def _pair(self, node: fx.Node) -> None:
        """A convolution and the 1 x 1 one that alone reads the same images, as one call where the first was."""
        images = node.args[0]
        if not isinstance(images, fx.Node) or len(images.users) != 2:
            return
        (other,) = set(images.users) - {node}
        conv = self.module(node)
        if not self.is_plain(other, nn.Conv2d) or not can_be_beside(self.module(other), conv):
            return
        name, beside = str(other.target), BesideConv2d(self.module(other))
        self.put(name, beside)
        self.net.set_submodule(name, beside)
        conv.pair_with(beside)
        with self.graph.inserting_after(images):
            both = self.graph.call_module(str(node.target), (images,))
        with self.graph.inserting_after(both):
            first = self.graph.call_function(operator.getitem, (both, 0))
            second = self.graph.call_module(name, (both,))
        self.replace(node, first)
        self.replace(other, second)

    def _pass_on(self, node: fx.Node) -> None:
        """Images that go into a block's first layer and around the block: their two gradients become one there."""
        other = self.other_reader(node)
        if other is not None and (self.is_add(other) or (self._is_conv(other) and other.args[1:] == node.args)):
            self.pass_on(node, other)

    def _is_conv(self, node: fx.Node) -> bool:
        return self.is_plain(node, WinogradConv2d) or self.is_plain(node, PostOpConv2d)

    def _is_norm(self, node: fx.Node) -> bool:
        return self.is_plain(node, nn.BatchNorm2d) and self.module(node).running_mean is not None
