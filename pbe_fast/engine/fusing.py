"""What follows a convolution, done as part of it: ReLU, the sum with a residual, a batch normalisation before a ReLU.

The forward pass of the model is followed symbolically, and rewritten where that is provably the same.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pbe_fast.engine.tracing import is_untouched, trace
from pbe_fast.engine.winograd import AffineReLU, WinogradConv2d, can_be_winograd

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd, "add_")


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
        A module of the same parameters and buffers under the same names; None where ``forward`` cannot be followed, or
        there is nothing to be gained.
    """
    if not any(isinstance(module, WinogradConv2d) for module in net.modules()):
        return None
    graph = trace(net, leaves=(WinogradConv2d,))
    if graph is None:
        return None
    rewriting = _Rewriting(net, graph)
    rewriting.run()
    return fx.GraphModule(net, graph).eval()


class _Rewriting:
    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        self._net, self._graph = net, graph
        self._modules = dict(net.named_modules(remove_duplicate=False))
        self._names = Counter(id(module) for module in self._modules.values())
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def run(self) -> None:
        for node in self._every("call_module"):
            if type(self._modules[str(node.target)]) is nn.Identity and node.args:
                self._replace(node, node.args[0])
        for node in self._every():
            if self._is_relu(node):
                self._fuse_relu(node)
        for node in self._every():
            if self._is_add(node):
                self._fuse_add(node)
        self._graph.lint()

    def _every(self, op: str | None = None) -> list[fx.Node]:
        return [node for node in self._graph.nodes if op in (None, node.op)]

    def _fuse_relu(self, node: fx.Node) -> None:
        source = self._alone(node.args[0])
        if source is None:
            return
        if self._is_conv(source):
            self._module(source).relu = True
            self._replace(node, source)
        elif self._is_add(source):
            conv = self._fuse_add(source)
            if conv is not None:
                self._module(conv).relu = True
                self._replace(node, conv)
        elif self._is_norm(source):
            name = str(source.target)
            self._net.set_submodule(name, AffineReLU(self._module(source)))
            self._modules[name] = self._net.get_submodule(name)
            self._replace(node, source)

    def _fuse_add(self, node: fx.Node) -> fx.Node | None:
        """The sum of a convolution's output and something else, as one call where the sum was."""
        for this, other in ((0, 1), (1, 0)):
            conv = self._alone(node.args[this])
            # In place, the sum changes what else its first operand is used for.
            if conv is None or not self._is_conv(conv) or (this == 1 and node.target in _IN_PLACE):
                continue
            if len(conv.args) > 1 or self._module(conv).relu or conv is node.args[other]:
                continue
            with self._graph.inserting_before(node):
                both = self._graph.call_module(str(conv.target), (conv.args[0], node.args[other]))
            self._replace(node, both)
            self._graph.erase_node(conv)
            return both
        return None

    def _replace(self, node: fx.Node, by: Any) -> None:
        node.replace_all_uses_with(by)
        self._graph.erase_node(node)

    def _alone(self, value: Any) -> fx.Node | None:
        """A node that is used once, or None."""
        return value if isinstance(value, fx.Node) and len(value.users) == 1 else None

    def _module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)]

    def _is_plain(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        """A call of such a module that is called nowhere else and does nothing else."""
        if node.op != "call_module" or node.kwargs or type(self._module(node)) is not kind:
            return False
        module = self._module(node)
        return self._calls[node.target] == 1 == self._names[id(module)] and is_untouched(module)

    def _is_conv(self, node: fx.Node) -> bool:
        return self._is_plain(node, WinogradConv2d)

    def _is_norm(self, node: fx.Node) -> bool:
        return self._is_plain(node, nn.BatchNorm2d) and self._module(node).running_mean is not None

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
            return type(module) is nn.ReLU and is_untouched(module) and len(node.args) == 1
        if not node.args or set(node.kwargs) - {"inplace"}:
            return False
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def _is_add(self, node: fx.Node) -> bool:
        known = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        return known and not node.kwargs and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
