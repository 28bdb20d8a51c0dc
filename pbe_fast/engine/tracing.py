"""Following a model's forward pass symbolically, as far as that can be done."""

from __future__ import annotations

import inspect

from torch import fx, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def trace(model: nn.Module, leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph | None:
    """The graph of ``forward`` with its further arguments at their defaults.

    Args:
        model: Followed in the mode that it is in.
        leaves: Modules of these types are one node each, as those of torch.nn are.

    Returns:
        None where ``forward`` decides by the values or the sizes of tensors.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)

    try:
        return Tracer().trace(model, concrete_args=_defaults(model))
    except Exception:
        # Whatever a foreign forward raises on a symbol, it is only known that it cannot be followed.
        return None


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward`` and nothing else."""
    return "forward" not in vars(module) and not any(getattr(module, hooks) for hooks in _HOOKS)


def _defaults(model: nn.Module) -> dict[str, object]:
    """The defaults of ``forward``'s further arguments: with them, and not with symbols, the model is called."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
