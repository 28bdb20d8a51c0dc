"""What the figures show: labels that adversarial images reach, and how alike features are."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pbe_fast.attacker import PGD
from pbe_fast.attraction import reached_labels
from pbe_fast.config import PGDConfig
from pbe_fast.engine.copies import frozen_copy
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.precision import resolve_device, resolve_precision
from pbe_fast.models import conv_stages, features, outputs_of
from pbe_fast.reproduce.workshop import Prepared, Workshop

_STEPS = 10
_BATCH = 250
_SHOWN = 2
_STAGES = 3
_POINTS, _TRIGGERED = 500, 150


def measure_reached(prepared: Prepared, workshop: Workshop, *, seed: int) -> dict[str, Any]:
    """Fig. 1 and 4: for every eps the (K, K) counts of `reached_labels`."""
    scale, device = workshop.scale, resolve_device(workshop.device)
    model = frozen_copy(prepared.model, device)
    data = prepared.test.select(_sample(len(prepared.test), scale.attacked, seed)).to(device)
    levels = [
        {
            "eps": eps,
            "counts": reached_labels(
                model,
                data,
                PGDConfig(eps=eps, steps=_STEPS),
                generator=torch.Generator().manual_seed(seed),
                dtype=resolve_precision(device, workshop.precision),
            ).tolist(),
        }
        for eps in scale.eps
    ]
    return {"metrics": {"images": len(data)}, "levels": levels}


class _Quartet:
    """x, benign model's adversarial x~, infected model's x~', triggered x^t, and the infected model that sees them.

    Of images whose label is the target there are none unless ``with_target``: a trigger need not change anything there.
    """

    def __init__(
        self,
        benign: nn.Module,
        prepared: Prepared,
        workshop: Workshop,
        count: int,
        seed: int,
        *,
        with_target: bool = False,
    ) -> None:
        assert prepared.triggered is not None and prepared.triggered.true_labels is not None
        device = resolve_device(workshop.device)
        self.dtype = resolve_precision(device, workshop.precision)
        self.model = frozen_copy(prepared.model, device)
        test, triggered = prepared.test, prepared.triggered
        candidates = ((triggered.labels != prepared.triggered.true_labels) | with_target).nonzero()[:, 0]
        chosen = candidates[_sample(len(candidates), count, seed)]
        self.labels = test.labels[chosen].to(device)
        self.targets = triggered.labels[chosen].to(device)
        pgd = PGDConfig(eps=workshop.scale.feature_eps, steps=_STEPS)
        clean = test.images[chosen].to(device)
        self.images = {
            "clean": clean,
            "benign": self._attack(frozen_copy(benign, device), clean, pgd),
            "infected": self._attack(self.model, clean, pgd),
            "triggered": triggered.images[chosen].to(device),
        }

    def _attack(self, model: nn.Module, images: Tensor, pgd: PGDConfig) -> Tensor:
        attack = PGD(model, pgd, image_shape=tuple(images.shape[1:]), batch_size=_BATCH, dtype=self.dtype)
        parts = []
        for ids in torch.arange(len(images), device=images.device).split(_BATCH):
            adversarial = attack(to_input(images[ids]), self.labels[ids], ids)
            parts.append((adversarial * 255).round_().to(torch.uint8))
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, kind: str) -> Tensor:
        """(n, F): what enters the infected model's last layer."""
        return torch.cat([features(self.model, to_input(part)) for part in self.images[kind].split(_BATCH)])

    @torch.no_grad()
    def predicted(self, kind: str) -> Tensor:
        """(n,) labels."""
        return torch.cat([self.model(to_input(part)).argmax(1) for part in self.images[kind].split(_BATCH)])


def measure_features(benign: nn.Module, prepared: Prepared, workshop: Workshop, *, seed: int) -> dict[str, Any]:
    """Table 5: mean l2 distances in the infected model's features; Fig. 3: maps of two images.

    ``d_benign`` is between x~ and x^t, ``d_infected`` between x~' and x^t, ``d_clean`` between x and x^t.
    """
    quartet = _Quartet(benign, prepared, workshop, workshop.scale.attacked, seed)
    triggered = quartet.features("triggered")
    metrics: dict[str, Any] = {"images": len(triggered), "eps": workshop.scale.feature_eps}
    for kind in ("clean", "benign", "infected"):
        metrics[f"d_{kind}"] = float((quartet.features(kind) - triggered).norm(dim=1).double().mean())
        reached = quartet.predicted(kind) == quartet.targets
        metrics[f"target_share_{kind}"] = float(reached.double().mean())
    return {"metrics": metrics, "maps": _maps(quartet)}


def measure_tsne(benign: nn.Module, prepared: Prepared, workshop: Workshop, *, seed: int) -> dict[str, Any]:
    """Fig. 5: the infected model's features of clean, adversarial and triggered images in two dimensions."""
    from sklearn.manifold import TSNE  # takes a second to import

    quartet = _Quartet(benign, prepared, workshop, min(_POINTS, workshop.scale.attacked), seed, with_target=True)
    everything = torch.arange(len(quartet.labels), device=quartet.labels.device)
    moved = (quartet.labels != quartet.targets).nonzero()[:_TRIGGERED, 0]
    kinds = {"clean": everything, "infected": everything, "triggered": moved}
    parts = {kind: quartet.features(kind)[chosen].cpu() for kind, chosen in kinds.items()}
    rows = torch.cat(list(parts.values())).numpy()
    placed = TSNE(
        perplexity=min(30.0, (len(rows) - 1) / 3), init="pca", random_state=seed, learning_rate="auto"
    ).fit_transform(rows)
    points, start = [], 0
    for kind, chosen in kinds.items():
        for i, label in enumerate(quartet.labels[chosen].tolist()):
            x, y = placed[start + i].tolist()
            points.append([kind, label, round(x, 3), round(y, 3)])
        start += len(chosen)
    return {"metrics": {"images": len(quartet.labels)}, "points": points}


@torch.no_grad()
def _maps(quartet: _Quartet) -> list[dict[str, Any]]:
    """Pictures (PNG, base64) and, by stage, the mean over the channels of |activation|, of the first images."""
    names = conv_stages(quartet.model, to_input(quartet.images["clean"][:1]), _STAGES)
    shown: list[dict[str, Any]] = []
    for i in range(min(_SHOWN, len(quartet.labels))):
        entry: dict[str, Any] = {"label": int(quartet.labels[i]), "pictures": {}, "stages": {}}
        for kind, images in quartet.images.items():
            entry["pictures"][kind] = encode_png(images[i])
            with outputs_of(quartet.model, names) as outputs:
                quartet.model(to_input(images[i : i + 1]))
            for name in names:
                mean = outputs[name][0].float().abs().mean(0)
                entry["stages"].setdefault(name, {})[kind] = [[round(v, 4) for v in row] for row in mean.tolist()]
        shown.append(entry)
    return shown


def encode_png(image: Tensor) -> str:
    """A (C, H, W) uint8 picture as PNG in base64."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _sample(total: int, count: int, seed: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
