"""The models of a run: making, opening, naming, measuring, comparing them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pbe_fast.attack import InfectedModel
from pbe_fast.data import ImageSet
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.precision import resolve_device
from pbe_fast.engine.rounding import precision_for
from pbe_fast.engine.streaming import fits
from pbe_fast.errors import InputError
from pbe_fast.metrics import Metrics, evaluate
from pbe_fast.models import ModelSpec, build_from_spec, check_model, load_model
from pbe_fast.models.io import CONFIG_NAME
from pbe_fast.poison import covered_test_set
from pbe_fast.ranking import Ranking, rank_images

UNKNOWN = {"acc": None, "asr": None, "asr_with_target": None, "recovered_acc": None}


def new_model(
    arch: str, data: ImageSet, *, width: int | None = None, normalize: bool = True, seed: int = 0
) -> tuple[nn.Module, ModelSpec]:
    """A network with random weights for images like those of ``data``.

    Args:
        arch: As for `pbe_fast.models.build_model`.
        data: Names of the classes, shape, and with ``normalize`` mean and deviation per channel.
        width: Channels of the first stage.
        normalize: Put the normalisation of the pixels in front of the network.
        seed: Of the weights.
    """
    mean, std = channel_statistics(data) if normalize else (None, None)
    channels, height, width_px = data.image_shape
    spec = ModelSpec(arch, data.num_classes, channels, (height, width_px), width, mean, std, data.class_names)
    torch.manual_seed(seed)
    return build_from_spec(spec), spec


def channel_statistics(data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in units of [0, 1]; a constant channel gets a deviation of 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(data.image_shape[0]):
        # From the counts of the 256 levels: no float copy of the whole set.
        counts = torch.bincount(data.images[:, channel].flatten(), minlength=256).cpu().double()
        mean = float((counts * levels).sum() / counts.sum())
        variance = float((counts * (levels - mean).square()).sum() / counts.sum())
        means.append(round(mean, 4))
        stds.append(round(variance**0.5, 4) or 1.0)
    return tuple(means), tuple(stds)


def open_model(path: Path, **given: Any) -> tuple[nn.Module, ModelSpec]:
    """`load_model`, with values that are None left out."""
    return load_model(path, **{name: value for name, value in given.items() if value is not None})


def require_size(specs: Mapping[Path, ModelSpec], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raises InputError for images of another size than a model is recorded to take.

    Most networks take any size, and are wrong about all but their own.

    Args:
        specs: Of the models, by their paths.
        sizes: (H, W) in pixels by what has it: "--image-size", or a set of images.
    """
    for path, spec in specs.items():
        for what, size in sizes.items():
            if spec.image_size is not None and size != spec.image_size:
                height, width = spec.image_size
                hint = f"; --image-size {height} resizes" if height == width else ""
                accepted = f"{height}x{width}, as the {CONFIG_NAME} of {path} says{hint}"
                raise InputError(f"size of {what}", got=f"{size[0]}x{size[1]}", accepted=accepted)


def spec_for(spec: ModelSpec, model: nn.Module, data: ImageSet) -> ModelSpec:
    """The spec with all that is known of the images, so that the next command need not be told.

    Args:
        spec: As it was read or inferred: of bare weights neither image size nor class names are known.
        model: What it describes; it has been tried on images like these.
        data: What it is purified with.
    """
    names = data.class_names if len(data.class_names) <= spec.num_classes else None
    channels, *size = data.image_shape
    known = dataclasses.replace(
        spec, image_size=spec.image_size or (size[0], size[1]), class_names=spec.class_names or names
    )
    if channels == spec.in_channels:
        return known
    # Weights without a convolution do not tell the channels. Where these make another network, they are not its own.
    other = dataclasses.replace(known, in_channels=channels)
    try:
        with torch.random.fork_rng(devices=[]):
            built = build_from_spec(other).state_dict()
    except InputError:
        return known
    return other if _shapes(built) == _shapes(model.state_dict()) else known


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def role_of(path: Path) -> str:
    """What a model is called in reports: "infected", "purified", or the name of its folder."""
    try:
        role = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")).get("role")
    except (OSError, ValueError, AttributeError):
        role = None
    return role if isinstance(role, str) else path.resolve().stem


def name_models(paths: Iterable[Path]) -> dict[str, Path]:
    """Models by what they are called in reports: their role, or the name of their file where two share one."""
    named: dict[str, Path] = {}
    for path in paths:
        name = role_of(path)
        if name in named:
            name = path.resolve().stem
        while name in named:
            name += "_"
        named[name] = path
    return named


def measure(
    model: nn.Module,
    test: ImageSet | None,
    triggered: ImageSet | None = None,
    *,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool = True,
) -> dict[str, float | None]:
    """`pbe_fast.evaluate` as plain values, all of them None without a test set.

    In float32 by default: the ONNX file, which is float32, is to be compared with these figures.
    """
    if test is None:
        return dict(UNKNOWN)
    where, before = resolve_device(device), next(model.parameters()).device
    check_model(model, test.image_shape, test.num_classes)
    dtype = precision_for(model, test.image_shape, device=where, requested=precision)
    sets = [None if data is None else data.to(where) for data in (test, triggered)]
    assert sets[0] is not None
    try:
        metrics: Metrics = evaluate(model.to(where), sets[0], sets[1], dtype=dtype, show_progress=progress)
    finally:
        model.to(before)
    return metrics.to_dict()


def measure_cover(
    infected: InfectedModel, test: ImageSet, *, device: str | torch.device = "auto", progress: bool = True
) -> dict[str, float | None] | None:
    """What an infected model says of test images that look triggered and should not trigger.

    WaNet's have the noisy warp, those of the input-aware attack the trigger of another image (its cross mode).

    Returns:
        ``acc`` and ``asr`` on them; None for a trigger without cover images.
    """
    config, trigger = infected.config, infected.trigger
    if trigger.cover_ratio == 0:
        return None
    covered = covered_test_set(test, trigger, setting=config.setting, target_label=config.target_label)
    assert covered.true_labels is not None
    true = dataclasses.replace(covered, labels=covered.true_labels)
    metrics = measure(infected.model, true, covered, device=device, progress=progress)
    return {"acc": metrics["acc"], "asr": metrics["asr"]}


def rank_with(
    infected: nn.Module,
    purified: nn.Module,
    data: ImageSet,
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> Ranking:
    """The ranking of ``data`` by two models (Eq. 9), on the CPU."""
    where = resolve_device(device)
    # What is too large for the device is sent batch by batch.
    images = data.images.to(where if fits(data.images, where) else "cpu")
    logits = []
    for name, model in (("infected", infected), ("purified", purified)):
        check_model(model, data.image_shape, data.num_classes)
        dtype = precision_for(model, data.image_shape, device=where, requested=precision)
        found = predict_logits(model.to(where), images, dtype=dtype, desc=f"{name} logits", show_progress=progress)
        logits.append(found.cpu())
    return rank_images(*logits)
