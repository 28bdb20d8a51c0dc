"""Refusing a model that the package cannot work with, before any work starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbe_fast.engine.copies import frozen_copy
from pbe_fast.errors import InputError, PBEWarning

_BATCH = 2
# Of probabilities in 16 bits.
_SLACK = 1e-2
_DIFFERENTIABLE = "a forward pass without no_grad, detach, numpy or quantised weights between the two"


def check_module(model: object, accepted: str = "a torch.nn.Module that returns logits (B, K)") -> nn.Module:
    """The model, if it is one.

    Raises:
        InputError: Anything else, a path or a state dict for one; it says that ``accepted`` was wanted.
    """
    if not isinstance(model, nn.Module):
        hint = " (build the network, then load_state_dict)" if isinstance(model, dict) else ""
        raise InputError("model", got=f"{type(model).__name__}{hint}", accepted=accepted)
    return model


def check_model(model: object, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Run one tiny batch and refuse a model that does not return finite logits (B, K).

    It runs in eval mode, on the model's own device and in its own dtype, without gradients. Train and eval state of
    every submodule, the buffers and the global random state are the same afterwards, also after an error.

    Args:
        model: What the user gave.
        image_shape: (C, H, W) of the images it will see.
        num_classes: Number of classes of the data; more logits than that bring a `PBEWarning`, fewer are refused.

    Returns:
        The number of logits K.

    Raises:
        InputError: Not a module, a forward pass that fails, an output that is no float tensor (B, K), K below
            ``num_classes``, logits that are not finite, or probabilities, which attacks and training would take for
            logits, and so for hardly any difference between the classes.
    """
    accepted = f"a torch.nn.Module that returns logits (B, K), K of at least {num_classes}"
    model = check_module(model, accepted)
    images = _probe(model, image_shape)
    shape = tuple(images.shape)
    try:
        with _untouched(model), torch.no_grad():
            logits: object = model(images)
    except Exception as error:
        raise InputError(
            f"the model's forward pass fails on images of shape {shape}, {images.dtype} on {images.device}",
            got=f"{type(error).__name__}: {error}",
            accepted=f"a model for images (B, {', '.join(map(str, image_shape))})",
        ) from error
    if not isinstance(logits, Tensor):
        raise InputError("output of the model", got=_describe(logits), accepted=accepted)
    if logits.ndim != 2 or logits.shape[0] != _BATCH or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)} for images of shape {shape}"
        raise InputError("output of the model", got=got, accepted=accepted)
    if logits.shape[1] < num_classes:
        raise InputError(
            "the model has fewer logits than the data has classes",
            got=f"{logits.shape[1]} logits and {num_classes} classes",
            accepted=accepted,
        )
    if not bool(logits.isfinite().all()):
        raise InputError("logits of the model", got="values that are NaN or infinite", accepted="finite logits")
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and bool(((logits.float().sum(1) - 1).abs() < _SLACK).all()):
        raise InputError(
            "output of the model",
            got="probabilities: no value is below 0, and those of each image sum to 1",
            accepted="logits, as they are before the softmax",
        )
    if logits.shape[1] > num_classes:
        warnings.warn(
            f"the data has {num_classes} classes and the model {logits.shape[1]} logits: those beyond the classes "
            "count as wrong answers; of data that lacks some classes, pbe_fast.as_image_set(data, class_names=[...]) "
            "says which label is which",
            PBEWarning,
            # The caller of purify and its like, which are decorated.
            stacklevel=4,
        )
    return int(logits.shape[1])


def check_trainable(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Refuse a model that cannot be trained: one tiny batch goes through a copy of it in train mode.

    Args:
        model: One that `check_model` takes. Neither it nor the global random state is changed.
        image_shape: (C, H, W) of the images it will see.

    Raises:
        InputError: A TorchScript, DDP or quantised model, one without parameters, one that cannot be copied, one that
            returns no logits (B, K) in train mode (some networks have auxiliary outputs there), or logits that do not
            depend on its parameters.
    """
    _refuse_wrapped(model, "model to train")
    if (name := _not_float(model)) is not None:
        got = f"{type(model).__name__}, of which '{name}' holds whole numbers"
        raise InputError("model to train", got=got, accepted="floating-point weights: the model before quantisation")
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise InputError("model to train", got=f"{type(model).__name__} without parameters", accepted="one with some")
    images = _probe(model, image_shape).float()
    copied = frozen_copy(model, images.device, image_shape).train().requires_grad_(True)
    what, accepted = "output of the model in train mode", "logits (B, K), as in eval mode, and nothing beside them"
    with _failing("forward pass in train mode"), _drawing(images.device), torch.enable_grad():
        logits: object = copied(images)
    if not isinstance(logits, Tensor):
        raise InputError(what, got=_describe(logits), accepted=accepted)
    if logits.ndim != 2 or logits.shape[0] != _BATCH or not logits.is_floating_point():
        raise InputError(what, got=f"{logits.dtype} of shape {tuple(logits.shape)}", accepted=accepted)
    if not logits.requires_grad:
        raise InputError(
            "gradient of the model's logits with respect to its parameters", got="none", accepted=_DIFFERENTIABLE
        )


def check_differentiable(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Refuse a model that cannot be attacked, as its logits have no gradient with respect to the images.

    Args:
        model: One that `check_model` takes. Neither it nor the global random state is changed.
        image_shape: (C, H, W) of the images it will see.

    Raises:
        InputError: A TorchScript or DDP model, one without such a gradient, or one that cannot be copied.
    """
    _refuse_wrapped(model, "model to attack")
    images = _probe(model, image_shape).float().requires_grad_(True)
    copied = frozen_copy(model, images.device, image_shape)
    with _failing("gradient with respect to the images"), _drawing(images.device), torch.enable_grad():
        logits = copied(images)
        found = torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] if logits.requires_grad else None
    if found is None:
        raise InputError(
            "gradient of the model's logits with respect to the images", got="none", accepted=_DIFFERENTIABLE
        )


def check_batch(model: nn.Module, images: int, what: str) -> None:
    """Refuse a single image to train a model with batch normalisation on: it has no deviation to normalise by.

    Args:
        model: The model.
        images: How many there are.
        what: What to call them in the message.

    Raises:
        InputError: One image, and a model with batch normalisation.
    """
    if images < 2 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        accepted = "2 or more, for a model with batch normalisation"
        raise InputError(f"number of {what}", got=images, accepted=accepted)


def _probe(model: nn.Module, image_shape: tuple[int, int, int]) -> Tensor:
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    device, dtype = (floats[0].device, floats[0].dtype) if floats else (torch.device("cpu"), torch.float32)
    images = torch.rand(_BATCH, *image_shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    return images.to(device=device, dtype=dtype)


def _refuse_wrapped(model: nn.Module, what: str) -> None:
    """Of what cannot be worked on, though what is inside it can."""
    if isinstance(model, torch.jit.ScriptModule):
        got = f"a TorchScript model ({type(model).__name__})"
        raise InputError(what, got=got, accepted="the torch.nn.Module that it was made of")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # A copy of it talks to the other processes, which may not be making one.
        raise InputError(what, got=type(model).__name__, accepted="the network in it: model.module")


def _not_float(model: nn.Module) -> str | None:
    """The name of a parameter, or of a quantised tensor of the state, that has no gradient."""
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return name
    for name, value in model.state_dict().items():
        # torch.ao packs weight and bias in one tuple.
        if any(
            isinstance(part, Tensor) and part.is_quantized for part in (value if type(value) is tuple else (value,))
        ):
            return name
    return None


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever a foreign model raises inside, told in the package's words."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"the model's {what} fails",
            got=f"{type(error).__name__}: {error}",
            accepted="a model that works in it, in float32, on a batch of two images",
        ) from error


def _drawing(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside changes no global random state."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes and buffers as they were, whatever the forward pass does to them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _describe(output: object) -> str:
    if isinstance(output, dict):
        return f"{type(output).__name__} with the keys {', '.join(map(str, list(output)[:6]))}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of {len(output)}: {', '.join(type(item).__name__ for item in output[:6])}"
    return type(output).__name__
