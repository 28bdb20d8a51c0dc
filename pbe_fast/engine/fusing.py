"""What follows a convolution, done as part of it: ReLU, the sum with a residual, a batch normalisation before a ReLU.

The forward pass of the model is followed symbolically, and rewritten where that is provably the same.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from pbe_fast.engine.rewriting import IN_PLACE_SUMS, Rewriting
from pbe_fast.engine.tracing import dice, is_untouched, trace
from pbe_fast.engine.winograd import AffineReLU, WinogradConv2d, can_be_winograd


def place_winograd(net: nn.Module) -> None:
    """Puts Winograd's convolutions in the place of those that can be; with hooks, or two names, they are left alone."""
    names = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    for name, module in list(net.named_modules()):
        if name and names[id(module)] == 1 and can_be_winograd(module) and is_untouched(module):
            assert isinstance(module, nn.Conv2d)
            net.set_submodule(name, WinogradConv2d(module))


def fused(net: nn.Module) -> nn.Module | None:
    """The same computation with fewer passes over memory, on the same parameters and buffers.

    Args:
        net: In eval mode, after `place_winograd`. Its modules are changed and not to be used any more, except where
            None is returned.

    Returns:
        A module of the same parameters and buffers under the same names; None where ``forward`` cannot be followed or
        rolls dice, or there is nothing to be gained.
    """
    if not any(isinstance(module, WinogradConv2d) for module in net.modules()):
        return None
    before = dice()
    graph = trace(net, leaves=(WinogradConv2d,))
    if graph is None or dice() != before:
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
        self.graph.lint()

    def _fuse_relu(self, node: fx.Node) -> None:
        source = self.alone(node.args[0])
        if source is None:
            return
        if self._is_conv(source):
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

    def _is_conv(self, node: fx.Node) -> bool:
        return self.is_plain(node, WinogradConv2d)

    def _is_norm(self, node: fx.Node) -> bool:
        return self.is_plain(node, nn.BatchNorm2d) and self.module(node).running_mean is not None
