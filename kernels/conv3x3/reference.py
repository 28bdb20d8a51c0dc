"""Winograd's F(2 x 2, 3 x 3) in plain PyTorch: the definition that the native version is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Channels come in groups of this many, the last one filled up with zeros.
GROUP = 16
# Y = A^T [(G g G^T) * (B^T d B)] A, of a 4 x 4 tile d and a 3 x 3 filter g; Lavin and Gray, section 4.1.
_B = ((1.0, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1.0, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A = ((1.0, 1, 1, 0), (0, 1, -1, -1))


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """G g G^T of every filter, bfloat16 (groups out, 16 positions, pairs of channels in, 16 channels out, 2)."""
    filters = weight.flip(2, 3).transpose(0, 1) if transposed else weight
    g = torch.tensor(_G, dtype=torch.float32, device=weight.device)
    positions = torch.einsum("ia,kcab,jb->kcij", g, filters.float(), g).flatten(2)
    positions = F.pad(positions, (0, 0, 0, -positions.shape[1] % GROUP, 0, -positions.shape[0] % GROUP))
    pairs = positions.unflatten(1, (-1, 2)).unflatten(0, (-1, GROUP))
    packed: Tensor = pairs.permute(0, 4, 2, 1, 3).contiguous().bfloat16()
    return packed


def conv3x3(
    x: Tensor,
    mask: Tensor | None,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    channels_out: int,
) -> Tensor:
    """What `pbe_fast.kernels.conv3x3.conv3x3` computes: bfloat16 (B, K, H, W), channels_last, from (B, C, H, W)."""
    height, width = x.shape[2:]
    if mask is not None:
        x = x.where(mask > 0, 0.0)
    v = _transformed(x)
    a = torch.tensor(_A, dtype=torch.float32, device=x.device)
    u = packed.float().permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)[:, :channels_out, : x.shape[1]]
    m = torch.einsum("pkc,bcyxp->bkyxp", u, v.flatten(4)).unflatten(4, (4, 4))
    y = torch.einsum("ia,bkyxad,jd->bkyixj", a, m, a).flatten(4).flatten(2, 3)[:, :, :height, :width]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if residual is not None:
        y = y + residual.float()
    if relu:
        y = y.relu()
    return y.to(torch.bfloat16, memory_format=torch.channels_last)


def _transformed(x: Tensor) -> Tensor:
    """B^T d B of all tiles, rounded: (B, C, rows of tiles, tiles in a row, 4, 4) float32."""
    height, width = x.shape[2:]
    # A frame of zeros, and one more line where the number of lines is odd.
    framed = F.pad(x.float(), (1, 1 + width % 2, 1, 1 + height % 2))
    b = torch.tensor(_B, dtype=torch.float32, device=x.device)
    return torch.einsum("ia,bcyxad,jd->bcyxij", b, framed.unfold(2, 4, 2).unfold(3, 4, 2), b).bfloat16().float()
