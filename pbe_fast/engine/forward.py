"""Logits of a whole image set, in the largest batches that fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pbe_fast.engine import profile
from pbe_fast.engine.copies import in_planes
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.machine import images_per_pass
from pbe_fast.engine.onednn import has_amx
from pbe_fast.engine.precision import autocast
from pbe_fast.engine.progress import progress
from pbe_fast.engine.streaming import stream

# A forward pass keeps a third of what training keeps per image: with the default batches, less memory than an update.
_LARGEST = 512
# Fewer images than this do not repay the time to make a folded copy of the model (50 ms for a ResNet-18).
_WORTH_FOLDING = 4096

# Of a model of the user's own that flattens feature maps by view: what torch says where their strides do not allow it.
_NO_CHANNELS_LAST = "view size is not compatible"
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "_STATUS_ALLOC_FAILED",
    "_DEVICE_ALLOCATION_FAILED",
)


def to_input(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) to float32 in [0, 1], channels_last: what every model of the package is fed."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def predict_logits(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    streamed: bool = False,
    desc: str = "",
    show_progress: bool = False,
) -> Tensor:
    """The model's logits, in eval mode and without gradients.

    The train/eval state of every submodule is afterwards as it was. A batch that does not fit in the device's memory
    is halved, never dropped. Of thousands of images, those of a copy with folded batch normalisation.

    Args:
        model: Returns (B, K) logits for float images in [0, 1]; in float32, or in the one dtype of its weights.
        images: (N, C, H, W) uint8, on the model's device, or on the CPU: then they are sent batch by batch. N of at
            least 1.
        dtype: Of the matrix products.
        batch_size: Images at a time, at most; if not given 512, or on a CPU without AMX 64 for each thread.
        streamed: Read batches ahead also where images and model share a device, as for a memory map.
        desc: Text of the progress bar.
        show_progress: Whether there is one.

    Returns:
        (N, K) float32 on the device of ``images``.
    """
    n, device = len(images), _device_of(model, images)
    size = min(n, batch_size or _default_size(device))
    # A frozen copy takes float32, whatever its first weight is held in.
    weights = torch.float32 if isinstance(model, FrozenCopy) else weight_dtype(model)
    if n >= _WORTH_FOLDING and weights == torch.float32 and not isinstance(model, (FrozenCopy, torch.jit.ScriptModule)):
        model = FrozenCopy(model, dtype=dtype, image_shape=tuple(images.shape[1:]))
    channels_last = True

    def answer(batch: Tensor) -> Tensor:
        floats = to_input(batch).to(weights)
        logits: Tensor = model(floats if channels_last else in_planes(floats)).float()
        return logits

    streamed = streamed or images.device != device
    out: Tensor | None = None
    batch: Tensor | None = None
    start = 0
    bar = progress(range(n), desc=desc, enabled=show_progress)
    # no_grad, not inference_mode: what a model keeps from this pass must still do for a later backward pass.
    with bar, eval_mode(model), torch.no_grad(), autocast(device, dtype):
        while start < n:
            try:
                for batch in _batches(images, start, size, device, streamed=streamed):
                    logits = answer(batch)
                    if out is None:
                        out = torch.empty(n, logits.shape[1], dtype=torch.float32, device=images.device)
                    out[start : start + len(logits)] = logits
                    start += len(logits)
                    bar.update(len(logits))
                    profile.record(images=len(logits), forwards=len(logits))
            except RuntimeError as error:
                if channels_last and _NO_CHANNELS_LAST in str(error):
                    channels_last = False
                    continue
                if size == 1 or not is_out_of_memory(error):
                    raise
            if start < n:
                # Not in the clause above: there the traceback still holds the memory of the batch that failed.
                size //= 2
                batch = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    assert out is not None
    return out


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out: a GPU's, the CPU's, or a workspace of cuDNN or cuBLAS."""
    # Only torch's own allocator raises the type. CUDA's runtime, its driver and Triton say it in words alone.
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(said in text for said in _OUT_OF_MEMORY)


def _default_size(device: torch.device) -> int:
    if device.type != "cpu" or has_amx():
        return _LARGEST
    return min(_LARGEST, images_per_pass())


def _batches(images: Tensor, start: int, size: int, device: torch.device, *, streamed: bool) -> Iterator[Tensor]:
    slices = (slice(i, min(i + size, len(images))) for i in range(start, len(images), size))
    return stream(images, slices, device) if streamed else (images[part] for part in slices)


def _device_of(model: nn.Module, images: Tensor) -> torch.device:
    return next((p.device for p in model.parameters()), images.device)


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
