"""What a model's forward pass calls, as a graph that can be changed where its meaning is known."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pbe_fast.engine.tracing import is_untouched

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
IN_PLACE_SUMS = (operator.iadd, "add_")


class Rewriting:
    """A graph, the modules that it calls, and what can be said of them.

    Args:
        net: The model that was followed.
        graph: From `pbe_fast.engine.tracing.trace`; it is changed.

    Attributes:
        modules: What the graph's names stand for.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        self.net, self.graph = net, graph
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self._names = Counter(id(module) for module in self.modules.values())
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def put(self, name: str, module: nn.Module) -> None:
        """Another module under a name that one has, or has not."""
        self.modules[name] = module
        self._names[id(module)] = 1

    def every(self, op: str | None = None) -> list[fx.Node]:
        """The nodes as they are now, in the order of the calls."""
        return [node for node in self.graph.nodes if op in (None, node.op)]

    def replace(self, node: fx.Node, by: Any) -> None:
        """Takes a node out, and gives whatever used it ``by``."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def alone(self, value: Any) -> fx.Node | None:
        """A node that is used once, or None."""
        return value if isinstance(value, fx.Node) and len(value.users) == 1 else None

    def module(self, node: fx.Node) -> Any:
        """What a node of a module calls."""
        return self.modules[str(node.target)]

    def is_plain(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        """A call of such a module that is called nowhere else and does nothing else."""
        if node.op != "call_module" or node.kwargs or type(self.module(node)) is not kind:
            return False
        module = self.module(node)
        return self._calls[node.target] == 1 == self._names[id(module)] and is_untouched(module)

    def is_relu(self, node: fx.Node) -> bool:
        """A ReLU, as a module, a function or a method."""
        if node.op == "call_module":
            module = self.module(node)
            return type(module) is nn.ReLU and is_untouched(module) and len(node.args) == 1
        if not node.args or set(node.kwargs) - {"inplace"}:
            return False
        if node.op == "call_function":
            return node.target in _RELU_FUNCTIONS
        return node.op == "call_method" and node.target in ("relu", "relu_")

    def is_add(self, node: fx.Node) -> bool:
        """A sum of two tensors and nothing else."""
        known = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        return known and not node.kwargs and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)

    def other_reader(self, node: fx.Node) -> fx.Node | None:
        """The one other that reads what a module reads alone, where that comes later and changes nothing in place."""
        images = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(images, fx.Node) or len(images.users) != 2:
            return None
        (other,) = set(images.users) - {node}
        order = self.every()
        if order.index(other) < order.index(node) or (other.target in IN_PLACE_SUMS and other.args[0] is images):
            return None
        return other

    def pass_on(self, node: fx.Node, other: fx.Node) -> None:
        """From now on a module returns what it reads, too, for the other: see ``passes_on`` of those that can."""
        self.module(node).passes_on = True
        images = node.args[0]
        assert isinstance(images, fx.Node)
        with self.graph.inserting_before(node):
            both = self.graph.call_module(str(node.target), (images,))
            first = self.graph.call_function(operator.getitem, (both, 0))
            same = self.graph.call_function(operator.getitem, (both, 1))
        other.replace_input_with(images, same)
        self.replace(node, first)
