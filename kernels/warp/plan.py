"""What is computed once per trigger: the control field, the sampling grid, and the taps of every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pbe_fast.kernels.warp import reference

# Offsets are int32, and so are the elements of one image in channels_last.
LARGEST = 2**31 - 1


def control_field(control_size: int, *, seed: int) -> Tensor:
    """Draws WaNet's control field: random displacements at the nodes of a coarse grid.

    Args:
        control_size: Nodes per side (the paper's k), at least 1.
        seed: Of a generator of its own; the same seed gives the same field on every machine.

    Returns:
        float32 (1, 2, k, k): U(-1, 1) divided by the mean of its absolute values; channel 0 moves along x.

    Raises:
        ValueError: ``control_size`` below 1.

    Source: Nguyen and Tran, WaNet, 2021, Eq. 3.
    """
    if control_size < 1:
        raise ValueError(f"control_size; got {control_size}; accepted: at least 1")
    return reference.control_field(control_size, seed)


def warp_grid(
    field: Tensor, height: int, width: int, *, warp_strength: float = 0.5, grid_rescale: float = 1.0
) -> Tensor:
    """Turns a control field into sampling positions for images of one size.

    Args:
        field: (1, 2, k, k), as from `control_field`.
        height: Of the images, pixels.
        width: Of the images, pixels.
        warp_strength: The paper's s; 1 moves a pixel by about half a pixel, as a full grid spans 2 units.
        grid_rescale: Factor on the positions, a little below 1 where none should leave the image.

    Returns:
        float32 (H, W, 2), x before y, in [-1, 1] with the pixels' centres at both ends (``align_corners=True``):
        ``clamp((identity + s * bicubic(field) / H) * rescale, -1, 1)``. Computed on the CPU, so that every device
        gets the same bits, and moved to the field's device.

    Raises:
        ValueError: A field of another shape or with values that are not finite, a size below 1, or a factor that is
            not finite.

    Source: Nguyen and Tran, WaNet, 2021, Eq. 4 and 5, and the clamping of the authors' code.
    """
    if field.dim() != 4 or field.shape[:2] != (1, 2) or field.shape[2] != field.shape[3] or field.shape[2] < 1:
        raise ValueError(f"field; got shape {tuple(field.shape)}; accepted: (1, 2, k, k)")
    if height < 1 or width < 1:
        raise ValueError(f"size of the images; got {height} x {width}; accepted: at least 1 x 1")
    if not (math.isfinite(warp_strength) and math.isfinite(grid_rescale)):
        raise ValueError(f"warp_strength, grid_rescale; got {warp_strength}, {grid_rescale}; accepted: finite")
    field_cpu = field.detach().cpu()
    if not bool(field_cpu.isfinite().all()):
        raise ValueError("field; got NaN or infinity; accepted: finite values")
    return reference.warp_grid(field_cpu, height, width, warp_strength, grid_rescale).to(field.device)


def check_grid(grid: Tensor) -> None:
    """Raises ValueError unless grid is a float (H, W, 2) without NaN or infinity.

    The values are not looked at under ``torch.compile``, where that would break the graph.
    """
    if grid.dim() != 3 or grid.shape[2] != 2 or grid.shape[0] < 1 or grid.shape[1] < 1:
        raise ValueError(f"grid; got shape {tuple(grid.shape)}; accepted: (H, W, 2)")
    if grid.dtype != torch.float32:
        raise ValueError(f"grid; got {grid.dtype}; accepted: float32")
    if grid.shape[0] * grid.shape[1] > LARGEST:
        raise ValueError(f"grid; got {grid.shape[0]} x {grid.shape[1]}; accepted: under 2^31 pixels")
    if not torch.compiler.is_compiling() and not bool(grid.isfinite().all()):
        raise ValueError("grid; got NaN or infinity; accepted: finite positions")


@dataclass(frozen=True)
class WarpPlan:
    """A grid with the taps of its pixels, computed once and used for any number of batches.

    Args:
        grid: float32 (H, W, 2), the sampling positions.
        offsets: int32 (H*W,), index of the top left of the four taps in a plane of H*W pixels.
        weights: float32 (4, H*W), of the upper left, upper right, lower left and lower right tap.
    """

    grid: Tensor
    offsets: Tensor
    weights: Tensor

    @staticmethod
    def of(grid: Tensor) -> WarpPlan:
        """Looks up the taps of every pixel.

        Args:
            grid: float32 (H, W, 2), as from `warp_grid`; positions outside of [-1, 1] sample zeros there.

        Returns:
            The plan, on the grid's device.

        Raises:
            ValueError: Another shape or dtype, or positions that are not finite.
        """
        check_grid(grid)
        with torch.no_grad():
            grid = grid.contiguous()
            return WarpPlan(grid, *reference.taps(grid, grid.shape[0], grid.shape[1]))

    def to(self, device: torch.device | str) -> WarpPlan:
        """The same plan on another device."""
        return WarpPlan(self.grid.to(device), self.offsets.to(device), self.weights.to(device))
