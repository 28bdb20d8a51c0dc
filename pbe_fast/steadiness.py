"""How well the infected model's answer withstands small changes of a picture: a trigger's seldom does.

A trigger was learned as it was shown: in one place, of one phase, without noise on it. Some small change of the picture
takes it away, and the answer returns to what is in the picture, which is not the label of a poisoned image. Which
change does it depends on the trigger, so each image is judged by the one that it stands worst.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.data import ImageSet
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.progress import progress

View = Callable[[Tensor], Tensor]

# A change under which the model loses more of its accuracy says more about the change than about the images.
_KEPT = 0.7
_BATCH = 512
_ANGLE, _NOISE = math.radians(12), 12 / 255


def _part(images: Tensor, of: int) -> int:
    """A part of the shorter side in pixels, at least one."""
    return max(1, min(images.shape[-2:]) // of)


def mirrored(images: Tensor) -> Tensor:
    """Left is right."""
    return images.flip(-1)


def moved(images: Tensor, sign: int) -> Tensor:
    """An eighth of the side down and to the right (``sign`` 1) or up and to the left (-1); the border is reflected."""
    by = _part(images, 8)
    start = by - sign * by
    framed = F.pad(images, (by,) * 4, mode="reflect")
    return framed[..., start : start + images.shape[-2], start : start + images.shape[-1]]


def blurred(images: Tensor) -> Tensor:
    """A binomial filter of 3 x 3."""
    # Not a convolution, whose rounding, and with it a grey level, may depend on the batch.
    padded = F.pad(images, (1,) * 4, mode="reflect")
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 16


def framed(images: Tensor) -> Tensor:
    """An eighth of the side along each border in the picture's mean colour."""
    by = _part(images, 8)
    out = images.mean((2, 3), keepdim=True).expand_as(images).clone()
    out[..., by:-by, by:-by] = images[..., by:-by, by:-by]
    return out


def noisy(images: Tensor) -> Tensor:
    """Plus Gaussian noise of deviation 12/255, the same on every image and every device."""
    noise = torch.randn(images.shape[1:], dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    return images + _NOISE * noise.to(images.device)


def enlarged(images: Tensor) -> Tensor:
    """Without a sixteenth of the side along each border, at the size that it had."""
    by = _part(images, 16)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return F.interpolate(images[..., by:-by, by:-by], size, mode="bilinear", align_corners=False)


def turned(images: Tensor) -> Tensor:
    """By 12 degrees; the border is reflected."""
    cos, sin = math.cos(_ANGLE), math.sin(_ANGLE)
    ratio = images.shape[-2] / images.shape[-1]
    matrix = images.new_tensor([[cos, -sin * ratio, 0.0], [sin / ratio, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


# Of float images (B, C, H, W) in [0, 1], H and W at least 4.
VIEWS: Mapping[str, View] = {
    "mirrored": mirrored,
    "moved down": lambda images: moved(images, 1),
    "moved up": lambda images: moved(images, -1),
    "blurred": blurred,
    "framed": framed,
    "noisy": noisy,
    "enlarged": enlarged,
    "turned": turned,
}


def without_waves(images: Tensor, frequencies: Sequence[tuple[int, int]]) -> Tensor:
    """Without what of them varies with given frequencies, or with one next to them; their brightness stays.

    Args:
        images: (B, C, H, W) float32.
        frequencies: (down, across) in periods over the image.

    Returns:
        (B, C, H, W) float32, not clamped.
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images)
    down = torch.fft.fftfreq(height, 1 / height, dtype=torch.float32, device=images.device)[:, None]
    across = torch.fft.rfftfreq(width, 1 / width, dtype=torch.float32, device=images.device)
    for u, v in frequencies:
        # A real image has each frequency with either sign.
        for sign in (1, -1):
            # Of an even side half of its frequencies is one, of either sign: they go round.
            far_down, far_across = (
                torch.remainder(at - sign * w + size / 2, size) - size / 2
                for at, w, size in ((down, u, height), (across, v, width))
            )
            near = (far_down.abs() <= 1) & (far_across.abs() <= 1)
            near[0, 0] = False  # the picture's brightness
            spectrum[..., near] = 0
    back: Tensor = torch.fft.irfft2(spectrum, (height, width))
    return back


def seen(images: Tensor, view: View) -> Tensor:
    """The changed uint8 pictures of uint8 ``images`` (B, C, H, W)."""
    return view(images.float() / 255).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def fragility(
    model: nn.Module,
    data: ImageSet,
    logits: Tensor,
    *,
    waves: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> Tensor:
    """How much the loss of each image rises under the change that it stands worst, compared with the other images.

    Args:
        model: The infected one, in eval mode.
        data: Its training set, N images; where it is too large for the model's device, it is sent batch by batch.
        logits: (N, K) of the images as they are.
        waves: Frequencies that lead the model elsewhere (`pbe_fast.leading_waves`); without them is a change as well.
        dtype: Of the matrix products.
        show_progress: Whether there is a bar.

    Returns:
        (N,) float32 in [0, 1): the rank of the image by the rise that it stands worst, as a share of all images. Only
        changes count under which the model keeps seven tenths of its accuracy. Zeros where there is no such change.
    """
    labels = data.labels
    device = next((p.device for p in model.parameters()), data.device)
    copy = FrozenCopy(model, dtype=dtype, image_shape=data.image_shape)
    worst = torch.zeros(len(data), dtype=torch.float32, device=labels.device)
    if min(data.image_shape[1:]) < 4:
        return worst
    views = list(VIEWS.values())
    if waves:
        views.append(functools.partial(without_waves, frequencies=waves))
    for view in progress(views, desc="steady images", enabled=show_progress):
        answers = torch.cat(
            [
                predict_logits(copy, seen(some.to(device), view), dtype=dtype).to(labels.device)
                for some in data.images.split(_BATCH)
            ]
        )
        if kept(answers, logits, labels):
            worst = torch.maximum(worst, rise(answers, logits, labels))
    return _ranks(worst) if worst.any() else worst


def kept(answers: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Whether the model keeps enough of its accuracy for a change to be one that pictures withstand."""
    right, before = ((values.argmax(1) == labels).sum() for values in (answers, logits))
    return bool(right >= _KEPT * before)


def rise(answers: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) float32 in [0, 1): the rank of each image by how much its loss rises, as a share of all."""
    return _ranks(
        F.cross_entropy(answers, labels, reduction="none") - F.cross_entropy(logits, labels, reduction="none")
    )


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort().float() / len(values)
