"""Looking into any classifier: its last linear layer, and the features that enter it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
