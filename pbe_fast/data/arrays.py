"""A pair of tensors or numpy arrays; also the conversions to uint8 that other readers use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pbe_fast.data.image_set import ImageSet
from pbe_fast.data.memory_map import writable_map
from pbe_fast.data.reader import ReadOptions, as_labels, resolve_class_names
from pbe_fast.errors import InputError

# Interpolation and compression leave values such as 1.0000001; a quarter of a grey level is far below any real mistake.
RANGE_SLACK = 1e-3
CHUNK = 4096


def accepts(source: Any) -> bool:
    """Whether ``source`` is a pair whose first part is a tensor or a numpy array."""
    return isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], (Tensor, np.ndarray))


def read(source: Any, options: ReadOptions) -> ImageSet:
    """An image set of (images, labels).

    Args:
        source: images (N, C, H, W), float in [0, 1] or uint8, C of 1 or 3; labels (N,) of any integer dtype.
            Floats are rounded to the nearest of 256 levels. uint8 tensors and memory maps are taken as they are.
        options: See `ReadOptions`.

    Returns:
        The set, on the device of the images.

    Raises:
        InputError: Another shape, dtype or range, NaN, or labels that do not fit.
    """
    images, values = source
    pixels = to_uint8(images)
    labels = as_labels(values, len(pixels)).to(pixels.device)
    names = resolve_class_names(labels, None, options, where=lambda i: f"index {i}")
    return ImageSet(pixels, labels, names, name=options.name or "arrays")


def to_uint8(images: Tensor | NDArray[Any], what: str = "images", ndim: int = 4) -> Tensor:
    """Images as a contiguous uint8 tensor.

    Args:
        images: (N, C, H, W), or (C, H, W) where ``ndim`` is 3; float in [0, 1] or uint8.
        what: What to call them in a message.
        ndim: 4 for a batch, 3 for one image.

    Raises:
        InputError: Another shape, dtype or range, or NaN; the message names the usual mistakes (NHWC, floats up to
            255, normalised pixels).
    """
    tensor = _as_tensor(images, what)
    _check_shape(tuple(tensor.shape), what, ndim)
    if tensor.dtype == torch.uint8:
        return tensor.contiguous()
    if not tensor.is_floating_point():
        raise InputError(f"dtype of {what}", got=tensor.dtype, accepted="uint8, or float in [0, 1]")
    _check_range(tensor, what)
    levels = torch.empty(tensor.shape, dtype=torch.uint8, device=tensor.device)
    for part, out in zip(torch.split(tensor, CHUNK), torch.split(levels, CHUNK), strict=True):
        out.copy_(part.float().mul(255).round_().clamp_(0, 255))
    return levels


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images (N, C, H, W) at (height, width) ``size``: bilinear, antialiased when it shrinks them."""
    if tuple(images.shape[2:]) == size:
        return images
    out = torch.empty((*images.shape[:2], *size), dtype=torch.uint8, device=images.device)
    for part, resized in zip(torch.split(images, CHUNK), torch.split(out, CHUNK), strict=True):
        floats = F.interpolate(part.float(), size=size, mode="bilinear", antialias=True)
        resized.copy_(floats.round_().clamp_(0, 255))
    return out


def _as_tensor(images: Tensor | NDArray[Any], what: str) -> Tensor:
    if isinstance(images, Tensor):
        return images.detach()
    try:
        images = writable_map(images)
        # torch warns about arrays that it must not write to, and has no negative strides.
        usable = images.flags.writeable and all(s >= 0 for s in images.strides)
        return torch.from_numpy(images if usable else images.copy())
    except (TypeError, ValueError) as error:  # objects, strings, a foreign byte order
        raise InputError(f"dtype of {what}", got=images.dtype, accepted="uint8, or float in [0, 1]") from error


def _check_shape(shape: tuple[int, ...], what: str, ndim: int) -> None:
    accepted = "(N, C, H, W) with C of 1 or 3"
    if ndim == 3:
        accepted = "(C, H, W) with C of 1 or 3"
    if len(shape) == ndim and shape[-3] in (1, 3):
        if 0 in shape:
            raise InputError(f"empty {what}", got=f"shape {shape}", accepted="at least one image of one pixel")
        return
    if len(shape) == ndim and shape[-1] in (1, 3):
        order = "(0, 3, 1, 2)" if ndim == 4 else "(2, 0, 1)"
        accepted += f"; the channels seem to come last: pass torch.as_tensor(images).permute{order}"
    elif len(shape) == ndim - 1:
        accepted += f"; a dimension is missing: for greyscale pass images[{':, ' * (ndim - 3)}None]"
    elif len(shape) == ndim and shape[-3] == 4:
        accepted += "; four channels: drop the alpha channel first"
    raise InputError(f"shape of {what}", got=shape, accepted=accepted)


def _check_range(images: Tensor, what: str) -> None:
    low, high = (float(v) for v in images.aminmax())
    if low != low or high != high:
        first = int(images.isnan().flatten(1).any(1).nonzero()[0]) if images.ndim == 4 else None
        raise InputError(
            f"NaN in {what}", got="NaN" if first is None else f"NaN in image {first}", accepted="floats in [0, 1]"
        )
    if low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK:
        return
    accepted = "floats in [0, 1]"
    if low >= 0 and high <= 255:
        accepted += "; these look like pixels from 0 to 255: divide by 255, or pass uint8"
    elif low < 0 and high < 20:
        accepted += (
            "; these look normalised: leave the normalisation to the model, as pbe_fast.Normalized(net, mean, std) does"
        )
    raise InputError(f"range of {what}", got=f"values from {low:g} to {high:g}", accepted=accepted)
