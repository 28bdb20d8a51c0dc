"""Logits of a whole image set, in the largest batches that fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress


def to_input(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [0, 1], channels_last: what every model of the package is fed."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 512,
    desc: str = "",
    show_progress: bool = False,
) -> Tensor:
    """The model's logits, in eval mode and without gradients.

    The train/eval state of every submodule is afterwards as it was. A batch that does not fit in the device's memory
    is halved, never dropped.

    Args:
        model: Returns (B, K) logits for float images in [0, 1]; in float32, or in the one dtype of its weights.
        images: (N, C, H, W) uint8, on the model's device; N of at least 1.
        dtype: Of the matrix products.
        batch_size: Images at a time, at most.
        desc: Text of the progress bar.
        show_progress: Whether there is one.

    Returns:
        (N, K) float32 on the device of ``images``.
    """
    out: Tensor | None = None
    start = 0
    weights = weight_dtype(model)
    bar = progress(range(len(images)), desc=desc, enabled=show_progress)
    # no_grad, not inference_mode: what a model keeps from this pass must still do for a later backward pass.
    with bar, eval_mode(model), torch.no_grad(), autocast(images.device, dtype):
        while start < len(images):
            logits: Tensor | None = None
            try:
                logits = model(to_input(images[start : start + batch_size]).to(weights)).float()
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            if logits is None:
                # Not in the clause above: there the traceback still holds the memory of the batch that failed.
                batch_size //= 2
                torch.cuda.empty_cache()
                continue
            if out is None:
                out = torch.empty(len(images), logits.shape[1], device=images.device)
            out[start : start + len(logits)] = logits
            start += len(logits)
            bar.update(len(logits))
    assert out is not None
    return out


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter; float32 where there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class eval_mode:
    """Context: the model in eval mode; afterwards every submodule is in the mode that it was in."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> nn.Module:
        self._training = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        return self._model

    def __exit__(self, *exc: object) -> None:
        for module, training in self._training:
            module.training = training
