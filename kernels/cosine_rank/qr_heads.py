"""Many classes: the same cosine from the features in front of two linear heads, without forming the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pbe_fast.kernels import cosine_rank


class QRHeads:
    """Replaces K logits of each model by at most D1 + D2 + 2 numbers with the same cosine.

    The logits are a = H [f1; 1; 0; 0] and b = H [0; 0; f2; 1] with H = [W1, b1, W2, b2]. With H = Q R and Q^T Q = 1,
    <a, b>, |a| and |b| stay the same when R takes the place of H. It pays where K > D1 + D2 + 2.

    Args:
        weight1: (K, D1) weights of the first model's last layer.
        bias1: (K,) its biases, or None.
        weight2: (K, D2) weights of the second model's last layer.
        bias2: (K,) its biases, or None.

    Raises:
        ValueError: The heads differ in K or device, a bias does not fit, or a value is not finite.
    """

    def __init__(self, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> None:
        first, second = _columns(weight1, bias1), _columns(weight2, bias2)
        if first.shape[0] != second.shape[0] or first.device != second.device:
            got = f"{tuple(weight1.shape)} on {weight1.device} and {tuple(weight2.shape)} on {weight2.device}"
            raise ValueError(f"heads; got weights {got}; accepted: (K, D1) and (K, D2) on one device")
        heads = torch.cat([first, second], dim=1)
        if not heads.isfinite().all():
            raise ValueError("heads; got NaN or infinite weights; accepted: finite values")
        # Once per pair of models: float64 costs nothing here.
        triangle = torch.linalg.qr(heads, mode="r").R.float()
        split = first.shape[1]
        # The first columns of a triangle end at the diagonal: below are zeros, which matter to neither product.
        self._first, self._second = triangle[:, :split].contiguous(), triangle[:, split:].contiguous()
        self.num_classes = heads.shape[0]
        self.num_columns = triangle.shape[0]

    def distance(self, features1: Tensor, features2: Tensor, *, backend: str | None = None) -> Tensor:
        """1 - cos of the two models' logits; see `cosine_distance`.

        Args:
            features1: (N, D1) input of the first model's last layer.
            features2: (N, D2) input of the second model's last layer.
            backend: As for `cosine_distance`.

        Returns:
            (N,) float32 in [0, 2] or NaN.

        Raises:
            ValueError: The features do not fit the heads.
        """
        a, b = _project(self._first, features1, "1"), _project(self._second, features2, "2")
        return cosine_rank.cosine_distance(a, b, backend=backend)


def _columns(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[W, b] in float64."""
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        got = None if bias is None else tuple(bias.shape)
        raise ValueError(f"head; got weight {tuple(weight.shape)}, bias {got}; accepted: (K, D) and (K,) or None")
    column = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.cat([weight.detach(), column.detach()[:, None]], dim=1).double()


def _project(columns: Tensor, features: Tensor, which: str) -> Tensor:
    """R [f; 1] for every row of features."""
    if features.dim() != 2 or features.shape[1] != columns.shape[1] - 1:
        accepted = f"(N, {columns.shape[1] - 1})"
        raise ValueError(f"shape of features{which}; got {tuple(features.shape)}; accepted: {accepted}")
    return torch.addmm(columns[:, -1], features.detach().float(), columns[:, :-1].T)
