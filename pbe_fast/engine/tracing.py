"""Following a model's forward pass symbolically, as far as that can be done.

torch.fx.Tracer.trace would replace ``nn.Module.__call__`` and ``__getattr__`` while it works: for every module of the
process, those that other threads are calling included, which then fail. Here only the modules of the model that is
followed get calls of their own.
"""

from __future__ import annotations

import inspect
import random
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy, _symbolic_trace

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Functions that torch.fx keeps as one node each (of math, and those given to fx.wrap) are replaced where they are
# looked up. That harms no other thread, as without a symbol they do what they did; but of two traces at a time one
# would put back what the other still needs.
_wrapping = threading.Lock()
# Who rolls dice does so every time; other threads, who draw from the same generators, hardly so often.
_ATTEMPTS = 5


def trace(model: nn.Module, leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph | None:
    """The graph of ``forward`` with its further arguments at their defaults.

    Args:
        model: Followed in the mode that it is in. No other thread may use it meanwhile.
        leaves: Modules of these types are one node each, as those of torch.nn are.

    Returns:
        None where ``forward`` decides by the values or the sizes of tensors, or rolls dice.
    """
    try:
        if any(_is_compiled(module) for module in model.modules()):
            return None
        for _ in range(_ATTEMPTS):
            before = _dice()
            # The tracer looks up which functions to replace as it is made.
            with _wrapping:
                graph = _Tracer(leaves).trace(model, concrete_args=_defaults(model))
            if _dice() == before:
                return graph
    except Exception:
        # Whatever a foreign forward raises on a symbol, it is only known that it cannot be followed.
        pass
    return None


def _dice() -> tuple[object, ...]:
    """The states of the CPU's generators: a ``forward`` that drew while it was followed would not draw any more."""
    _, key, *position = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), tuple(position), torch.get_rng_state().numpy().tobytes()


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in _HOOKS)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = leaves
        self.parameters: dict[str, Proxy] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """What fx.Tracer.trace does, with `_followed` in the place of a change of ``nn.Module``."""
        self.root = root
        self.root_module_name = root._get_name()
        self.graph = fx.Graph()
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs = {
            value: f"{name}.{key}".lstrip(".")
            for name, module in root.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        forward, args = self.create_args_for_root(type(root).forward, True, concrete_args)
        with self._kept_functions(root), _followed(root, self):
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
        for node in self.graph.nodes:
            # The classes in it, which last for the trace, would keep the model.
            node.meta.clear()
        return self.graph

    @contextmanager
    def _kept_functions(self, root: nn.Module) -> Iterator[None]:
        with _symbolic_trace._Patcher() as patcher:
            _symbolic_trace._patch_wrapped_functions(patcher)
            scopes = [getattr(module.forward, "__globals__", {}) for module in root.modules()]
            for scope in (*scopes, *(vars(module) for module in self._autowrap_search)):
                _symbolic_trace._autowrap_check(patcher, scope, self._autowrap_function_ids)
            yield


class _Followed(nn.Module):
    """In front of a module's own class, while the module is followed."""

    _follower: ClassVar[_Tracer]

    def __init_subclass__(cls) -> None:
        # Nothing further up is to hear of a class that lasts for one trace, a registry for one.
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._follower.call_module(self, super().__call__, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Without a symbol in its place, what is done with a parameter itself would not be recorded.
        return self._follower.getattr(name, super().__getattr__(name), self._follower.parameters)


@contextmanager
def _followed(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Inside, calls and parameters of the modules of ``root`` go through ``tracer``."""
    before = [(module, type(module)) for module in root.modules()]
    made: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        for module, kind in before:
            if kind not in made:
                made[kind] = _in_front(kind, tracer)
            module.__class__ = made[kind]
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


def _in_front(kind: type[nn.Module], tracer: _Tracer) -> type[nn.Module]:
    # The names that `is_leaf_module` and error messages go by are the class's own.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_follower": tracer}
    return types.new_class(kind.__name__, (_Followed, kind), exec_body=lambda body: body.update(names))


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile: as a module around it, or in place."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _defaults(model: nn.Module) -> dict[str, object]:
    """The defaults of ``forward``'s further arguments: with them, and not with symbols, the model is called."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
