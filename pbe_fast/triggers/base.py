"""What every trigger is: a function of an image, fixed by its hyperparameters and a seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from pbe_fast.engine.seeding import check_seed
from pbe_fast.errors import InputError

ImageShape = tuple[int, int, int]


class Trigger(ABC):
    """The paper's Trigger(x) (Sec. 3.1) for images of one shape.

    A trigger is rebuilt from ``spec()`` and, where training taught it something, from ``weights()``: whatever it draws
    at random comes from ``seed``.

    Args:
        image_shape: (C, H, W) of the images it will be put on.
        seed: Fixes what the trigger draws at random.
    """

    name: ClassVar[str]
    clean_label: ClassVar[bool] = False
    """Poisons images of the target class only and leaves their label as it is."""
    cover_ratio: ClassVar[float] = 0.0
    """How many cover images there are for one poisoned image: changed by `cover`, label kept."""
    redraw_each_epoch: ClassVar[bool] = False
    """The attacker controls training, and draws the poisoned subset anew in every epoch."""

    def __init__(self, image_shape: ImageShape, *, seed: int = 0) -> None:
        c, h, w = image_shape
        self.image_shape = (int(c), int(h), int(w))
        self.seed = check_seed(seed)

    def apply(self, images: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Triggered copies of ``images``.

        Args:
            images: (B, C, H, W) float in [0, 1].
            image_ids: (B,) int64, for triggers that differ from image to image.

        Returns:
            (B, C, H, W) float in [0, 1], on the device of ``images``.

        Raises:
            InputError: Images of another shape than the trigger was made for.
        """
        self.check_shape(tuple(images.shape[1:]))
        return self._apply(images, image_ids).clamp_(0, 1)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises InputError for images of another shape (C, H, W) than the trigger was made for."""
        if shape != self.image_shape:
            raise InputError(
                f"images for the {self.name} trigger", got=f"shape {shape}", accepted=f"(C, H, W) = {self.image_shape}"
            )

    @abstractmethod
    def _apply(self, images: Tensor, image_ids: Tensor | None) -> Tensor:
        """`apply` without the checks; may return a tensor slightly outside [0, 1], never ``images`` itself."""

    def cover(self, images: Tensor, image_ids: Tensor, *, draw: int = 0, others: Tensor | None = None) -> Tensor:
        """Cover images: near the trigger, but keeping their true label (only where ``cover_ratio`` > 0).

        Args:
            images: (B, C, H, W) float in [0, 1].
            image_ids: (B,) int64, on the device of ``images``; with ``draw`` they fix what is random in an image.
            draw: Another number gives other cover images, for a set that is drawn anew in every epoch.
            others: (B, C, H, W) float in [0, 1], one other image for each, for triggers that depend on the image.

        Returns:
            (B, C, H, W) float in [0, 1].
        """
        raise InputError(f"cover images of the {self.name} trigger", accepted="triggers with cover_ratio > 0")

    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments, beside ``seed``, that rebuild this trigger."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Plain JSON values from which `make_trigger` rebuilds this trigger."""
        return {
            "name": self.name,
            "image_shape": list(self.image_shape),
            "seed": self.seed,
            **self.hyperparameters(),
        }

    def weights(self) -> dict[str, Tensor]:
        """What training taught the trigger, by name, on the CPU; empty for a trigger that is not trained."""
        return {}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `weights` gave.

        Raises:
            InputError: Names, shapes or values that are not those of this trigger.
        """
        if weights:
            got = f"{len(weights)} tensors"
            raise InputError(f"weights of the {self.name} trigger", got=got, accepted="none: it is not trained")
