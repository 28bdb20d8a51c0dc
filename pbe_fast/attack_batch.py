"""The tensors that an attack works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttackBatch:
    """Tensors of fixed address that the attack works on, one row per image; ``model_input`` may be ``adversarial``.

    Where only ``windows`` of the images are changed, they hold which pixels those are.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    adversarial: Tensor
    model_input: Tensor
    fooled: Tensor
    windows: Tensor | None = None

    @classmethod
    def empty(
        cls, rows: int, shape: tuple[int, ...], device: torch.device, input_dtype: torch.dtype | None
    ) -> AttackBatch:
        """Zeros for ``rows`` images of (C, H, W); without ``input_dtype`` the model reads the adversarial ones."""

        def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
            zeros = torch.zeros((rows, *shape), dtype=dtype, device=device)
            return zeros.contiguous(memory_format=torch.channels_last)

        images, adversarial = pictures(), pictures()
        labels, ids = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        model_input = adversarial if input_dtype is None else pictures(input_dtype)
        return cls(images, labels, ids, adversarial, model_input, labels.bool())

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: slice | Tensor) -> AttackBatch:
        """Some rows: for a slice the same memory, for indices a copy."""
        adversarial = _pick(self.adversarial, index)
        shared = self.model_input is self.adversarial
        model_input = adversarial if shared else _pick(self.model_input, index)
        images = _pick(self.images, index)
        windows = None if self.windows is None else self.windows[index]
        return AttackBatch(
            images, self.labels[index], self.ids[index], adversarial, model_input, self.fooled[index], windows
        )


def per_image(mask: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return mask.view(-1, 1, 1, 1)


def _pick(tensor: Tensor, index: slice | Tensor) -> Tensor:
    picked = tensor[index]
    if isinstance(index, Tensor):
        return picked.contiguous(memory_format=torch.channels_last)
    return picked
