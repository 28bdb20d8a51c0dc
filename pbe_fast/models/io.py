"""Saving a model with what it takes to build it again, and loading it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pbe_fast.engine.files import atomic_write, write_text
from pbe_fast.errors import InputError, UnsafeFileError
from pbe_fast.models.registry import (
    ACCEPTED_ARCHS,
    OWN_ARCHS,
    UNKNOWN_ARCH,
    ModelSpec,
    build_from_spec,
    is_user_code,
)
from pbe_fast.models.weights import is_normalized, read_weights, strip_prefixes, without_prefix

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_FORMAT = "pbe_fast.model/1"


def save_model(
    model: nn.Module, spec: ModelSpec, folder: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write ``model.safetensors`` and ``config.json``, each under its final name only when it is whole.

    Args:
        model: The network that ``spec`` describes, on any device, in any memory format, compiled or not.
        spec: What `load_model` needs to build it again.
        folder: Where to; made if need be. Files of these two names are replaced.
        extra: Further JSON values for ``config.json``, beside the spec; `load_model` does not look at them.

    Returns:
        The folder.

    Raises:
        InputError: The spec does not describe this model (so that nothing is written that cannot be read), or an
            ``extra`` name that is taken.
        OutputError: The folder cannot be written to.
    """
    folder = Path(folder)
    net = None if spec.arch == UNKNOWN_ARCH else _build(spec)
    state = {}
    for key, value in strip_prefixes(model.state_dict(), () if net is None else net.state_dict()).items():
        if not isinstance(value, Tensor):
            raise InputError(f"'{key}' in the model's state_dict", got=type(value).__name__, accepted="tensors only")
        # A copy each: safetensors refuses tensors that share memory, as tied weights do, and strides.
        state[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if net is not None:
        _require_match(state, net, f"the model to be saved as {spec.arch}")
    config = {"format": _FORMAT, "model": spec.to_dict()}
    if taken := sorted(config.keys() & (extra or {}).keys()):
        raise InputError("extra names for config.json", got=", ".join(taken), accepted="names other than these")
    text = json.dumps({**config, **(extra or {})}, indent=2) + "\n"
    with atomic_write(folder / WEIGHTS_NAME) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG_NAME, text)
    return folder


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """A model from a folder that `save_model` wrote, or from a weights file. Nothing in the file is ever executed.

    Args:
        path: A folder with ``config.json`` and ``model.safetensors``; or a ``.safetensors``, ``.pt``, ``.pth`` or
            ``.ckpt`` file, beside which a ``config.json`` of ours is read if there is one. A prefix that all its keys
            share, as Lightning's ``model.``, is taken off where the network's own keys are left.
        arch: As for `build_model`; needed without a config, or where the config names the user's own code, which a
            file alone cannot make us import.
        num_classes: Like the rest, for weights without a config, or to overrule it. By default the length of the
            last layer in the file: linear, or a convolution in a network without any.
        in_channels: Default: as the first convolution in the file takes.
        image_size: (H, W) in pixels. Default: not known.
        width: Default: as the first convolution in the file has, for our own networks.
        mean: Per-channel mean for networks trained on normalised images; default: as the file or the config has, or
            none. What is there cannot be overruled: it is part of the model.
        std: Per-channel standard deviation, as ``mean``.

    Returns:
        The model on the CPU, in eval mode, and its spec.

    Raises:
        InputError: Not there, damaged, weights that do not fit the network, naming keys and shapes, or a mean or std
            other than the model has.
        UnsafeFileError: A pickle with code in it, or a config that names the user's own code while ``arch`` does not.
    """
    if (mean is None) != (std is None):
        got = "mean without std" if std is None else "std without mean"
        raise InputError("normalisation of the images (--mean, --std)", got=got, accepted="both or none")
    path = Path(path)
    folder, weights = (path, path / WEIGHTS_NAME) if path.is_dir() else (path.parent, path)
    state = read_weights(weights)
    given: dict[str, Any] = {
        "arch": arch,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "width": width,
        "mean": mean,
        "std": std,
    }
    given = {name: value for name, value in given.items() if value is not None}
    spec = _read_spec(folder / CONFIG_NAME)
    if spec is None:
        state, spec = _infer_spec(state, given, weights)
    else:
        if spec.mean is not None and spec.std is not None:
            _require_same_normalisation(given, spec.mean, spec.std, folder / CONFIG_NAME)
        if arch is None and is_user_code(spec.arch):
            raise UnsafeFileError(
                f"{folder / CONFIG_NAME} names code to import; got arch '{spec.arch}'; "
                "accepted: the same name given by you as arch (--arch), where you trust it"
            )
        if given.get("num_classes", spec.num_classes) != spec.num_classes:
            # The names were those of other logits.
            spec = dataclasses.replace(spec, class_names=None)
        spec = dataclasses.replace(spec, **given)
    model = _build(spec)
    state = _fit_normalisation(without_prefix(state, _bare_names(model, spec)), spec)
    _require_match(state, model, str(weights))
    model.load_state_dict(state)
    return model.eval(), spec


def _read_spec(path: Path) -> ModelSpec | None:
    """The spec in a config of ours, or None: other programs name their files config.json too."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read", got=error, accepted="JSON as save_model writes it") from error
    if not isinstance(config, dict) or not str(config.get("format", "")).startswith("pbe_fast.model/"):
        return None
    if config["format"] != _FORMAT or not isinstance(config.get("model"), dict):
        raise InputError(f"format of {path}", got=config["format"], accepted=_FORMAT)
    return ModelSpec.from_dict(config["model"])


def _infer_spec(state: dict[str, Tensor], given: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], ModelSpec]:
    """What the weights themselves say, overruled by what was given; and they without a prefix of other programs."""
    if "arch" not in given:
        raise InputError(f"no {CONFIG_NAME} of ours beside {path}", got="no arch", accepted=ACCEPTED_ARCHS)
    arch = given["arch"]
    # safetensors keeps no order, so which key is the first convolution's is asked of a network of this kind.
    probe = _build(ModelSpec(arch, given.get("num_classes", 2), given.get("in_channels", 3)))
    state = without_prefix(state, set(probe.state_dict()))
    found: dict[str, Any] = {}
    bare: Mapping[str, Tensor] = state
    # The user's own function may well return a wrapper with these very names.
    if is_normalized(state) and not is_user_code(arch):
        found = {name: tuple(state[name].flatten().tolist()) for name in ("mean", "std")}
        _require_same_normalisation(given, found["mean"], found["std"], path)
        bare = {key.removeprefix("net."): value for key, value in state.items() if key not in found}
    values = {"in_channels": 3, **found, **_sizes(bare, probe, arch), **given}
    if "num_classes" not in values:
        if bare.keys() != probe.state_dict().keys():
            _require_match(bare, probe, str(path))
        accepted = "a network with a linear or convolutional layer, or num_classes for load_model"
        raise InputError(f"number of classes of {path}", got="neither such layer in it", accepted=accepted)
    return state, ModelSpec(**values)


def _sizes(state: Mapping[str, Tensor], probe: nn.Module, arch: str) -> dict[str, int]:
    """Classes, channels and width as the weights have them in the layers of ``probe``, as far as they are there."""
    found: dict[str, int] = {}
    layers = [(name, m) for name, m in probe.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = nn.Linear if any(isinstance(module, nn.Linear) for _, module in layers) else nn.Conv2d
    for name, module in layers:
        weight = state.get(f"{name}.weight")
        if weight is None or weight.ndim != module.weight.ndim:
            continue
        if isinstance(module, last):
            found["num_classes"] = weight.shape[0]
        if isinstance(module, nn.Conv2d) and "in_channels" not in found:
            found["in_channels"] = weight.shape[1] * module.groups
            if arch in OWN_ARCHS:
                found["width"] = weight.shape[0]
    return found


def _require_same_normalisation(
    given: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], where: Path
) -> None:
    """Refuse a normalisation beside the one that the model has."""
    for name, has in (("mean", mean), ("std", std)):
        asked = list(given.get(name, has))
        same = len(asked) == len(has) and all(abs(a - b) <= 1e-6 for a, b in zip(asked, has, strict=True))
        if not same:
            accepted = f"{_numbers(has)}, as {where} has: it is part of the model, so leave it out"
            raise InputError(f"{name} of the normalised images (--{name})", got=_numbers(asked), accepted=accepted)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _build(spec: ModelSpec) -> nn.Module:
    """The network of a spec; its random weights are replaced at once, so nothing is taken from the random state."""
    with torch.random.fork_rng(devices=[]):
        return build_from_spec(spec)


def _bare_names(model: nn.Module, spec: ModelSpec) -> set[str]:
    """The keys of a model without those of a `Normalized` around it."""
    names = set(model.state_dict())
    return names if spec.mean is None else {name.removeprefix("net.") for name in names - {"mean", "std"}}


def _fit_normalisation(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Weights of a bare network put where a `Normalized` has them; the spec's mean and std take precedence."""
    if spec.mean is None or spec.std is None:
        return dict(state)
    if is_normalized(state):
        inner = {key: value for key, value in state.items() if key not in ("mean", "std")}
    else:
        inner = {f"net.{key}": value for key, value in state.items()}
    constants = {"mean": torch.tensor(spec.mean), "std": torch.tensor(spec.std)}
    return {**inner, **{name: value.view(1, -1, 1, 1) for name, value in constants.items()}}


def _require_match(state: Mapping[str, Tensor], model: nn.Module, what: str) -> None:
    """Refuse weights with other names or shapes than the network has, saying which."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    mismatched = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    problems = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
    if problems:
        raise InputError(
            f"weights do not fit the network: {what}",
            got="; ".join(problems),
            accepted=f"the {len(wanted)} tensors of {type(model).__name__} ({_first(list(wanted))})",
        )


def _first(keys: Sequence[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
