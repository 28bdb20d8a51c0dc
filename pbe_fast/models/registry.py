"""From an architecture's name to a network: `build_model`, and `ModelSpec`, what a saved model's config.json holds."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pbe_fast.errors import InputError
from pbe_fast.models.normalized import Normalized
from pbe_fast.models.preact_resnet import PreActResNet18
from pbe_fast.models.small_cnn import SmallCNN
from pbe_fast.torchvision_compat import import_torchvision

ACCEPTED_ARCHS = "'preact_resnet18', 'resnet18', 'small_cnn', 'torchvision:NAME' or 'module:function'"
UNKNOWN_ARCH = "unknown"
_OURS: dict[str, Callable[..., nn.Module]] = {"preact_resnet18": PreActResNet18, "small_cnn": SmallCNN}
# Of the first stage. The last one of a ResNet is eight times as wide, and its weights grow with the square.
MAX_WIDTH = 4096
OWN_ARCHS = tuple(_OURS)
# These two return tuples in training unless their auxiliary heads are left out.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a network again before its weights are loaded.

    Args:
        arch: As for `build_model`, or ``unknown`` for a network that came as an object and not by name.
        num_classes: Number of logits K.
        in_channels: Channels C of the images.
        image_size: (H, W) in pixels; a single number stands for a square; None where it is not known.
        width: Channels of the first stage; None for the architecture's own default, or where it has no such choice.
        mean: Per-channel mean of a `Normalized` wrapper, in units of [0, 1]; None without such a wrapper.
        std: Per-channel standard deviation, as ``mean``.
        class_names: What the logits stand for, in their order, so that a set in which some classes are absent is
            numbered as the training set was; None where it is not known. Logits beyond them stand for nothing.

    Raises:
        InputError: A number below 1, more names than logits, or one of ``mean`` and ``std`` without the other.
    """

    arch: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int] | None = None
    width: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.arch, str):
            raise InputError("arch of a model spec", got=repr(self.arch), accepted=ACCEPTED_ARCHS)
        if self.image_size is not None:
            size = (self.image_size,) * 2 if isinstance(self.image_size, int) else tuple(self.image_size)
            if len(size) != 2:
                raise InputError("image_size of a model spec", got=size, accepted="(height, width) or one number")
            object.__setattr__(self, "image_size", size)
        for name in ("mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(float(v) for v in value))
        for number in (
            self.num_classes,
            self.in_channels,
            1 if self.width is None else self.width,
            *(self.image_size or ()),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError("a number in a model spec", got=repr(self), accepted="integers of 1 or more")
        if (self.mean is None) != (self.std is None):
            raise InputError("mean and std of a model spec", got=f"{self.mean} and {self.std}", accepted="both or none")
        if self.class_names is not None:
            given: object = self.class_names
            names = tuple(given) if isinstance(given, list | tuple) else ()
            if not 1 <= len(names) <= self.num_classes or not all(isinstance(name, str) for name in names):
                raise InputError(
                    "class_names of a model spec", got=repr(self.class_names), accepted=f"1 to {self.num_classes} names"
                )
            object.__setattr__(self, "class_names", names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images.

        Raises:
            InputError: The size is not known.
        """
        if self.image_size is None:
            raise InputError("image size of the model", got="none recorded", accepted="a spec with image_size=(H, W)")
        return (self.in_channels, *self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` made these values of.

        Raises:
            InputError: A name too many, a required one missing, or a value that the spec refuses.
        """
        fields = dataclasses.fields(cls)
        known = {f.name for f in fields}
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        if not required <= set(values) <= known:
            raise InputError(
                "model spec",
                got=f"the names {sorted(values)}",
                accepted=f"{sorted(required)} and any of {sorted(known)}",
            )
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("model spec", got=dict(values), accepted="numbers, and lists of numbers") from error


def build_model(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network with random weights.

    Args:
        arch: ``preact_resnet18``, ``small_cnn``, ``resnet18`` (short for ``torchvision:resnet18``),
            ``torchvision:NAME`` (its classifiers, unchanged: 3 channels, random weights), or ``module:function``: the
            function is imported and called with those of num_classes, in_channels and width that its signature has.
        num_classes: Number of logits K.
        in_channels: Channels C of the images.
        width: Channels of the first stage; None for the architecture's default (64 for PreActResNet-18).
        mean: Per-channel mean in units of [0, 1]; with ``std``, the network is put inside a `Normalized`.
        std: Per-channel standard deviation in units of [0, 1].

    Raises:
        InputError: An unknown name, or a combination that the architecture does not have.
    """
    if (mean is None) != (std is None):
        raise InputError("mean and std", got=f"{mean} and {std}", accepted="both or none")
    if num_classes < 1 or in_channels < 1 or (width is not None and width < 1):
        raise InputError(
            "size of a network",
            got=f"num_classes {num_classes}, in_channels {in_channels}, width {width}",
            accepted="1 or more each",
        )
    if arch in OWN_ARCHS and width is not None and width > MAX_WIDTH:
        raise InputError("width of a network", got=width, accepted=f"1 to {MAX_WIDTH}")
    try:
        net = _build_net(arch, num_classes, in_channels, width)
    except (RuntimeError, MemoryError) as error:
        # torch's allocator says what it could not get, and not what it was for.
        raise InputError(
            f"'{arch}' cannot be built",
            got=f"num_classes {num_classes}, in_channels {in_channels}, width {width}: {str(error).splitlines()[0]}",
            accepted="a network that fits in memory",
        ) from error
    if mean is None or std is None:
        return net
    if len(mean) not in (1, in_channels):
        raise InputError("mean and std", got=f"{len(mean)} values", accepted=f"one per channel ({in_channels})")
    return Normalized(net, mean, std)


def build_from_spec(spec: ModelSpec) -> nn.Module:
    """The network of a spec, with random weights.

    Raises:
        InputError: As `build_model`.
    """
    return build_model(
        spec.arch,
        num_classes=spec.num_classes,
        in_channels=spec.in_channels,
        width=spec.width,
        mean=spec.mean,
        std=spec.std,
    )


def spec_of(
    model: nn.Module,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...] | None = None,
) -> ModelSpec:
    """The spec under which a model that came as an object can be saved.

    Our own networks are recognised, bare or inside a `Normalized`; for any other the arch is ``unknown``, and whoever
    loads the file has to name it.

    Args:
        model: Any network.
        num_classes: Number of logits K.
        image_shape: (C, H, W) of its images.
        class_names: What its logits stand for, where that is known.
    """
    mean = std = None
    if isinstance(model, Normalized):
        mean, std = tuple(model.mean.flatten().tolist()), tuple(model.std.flatten().tolist())
        model = model.net
    arch, width = UNKNOWN_ARCH, None
    for name, kind in _OURS.items():
        if type(model) is kind and isinstance(model, PreActResNet18 | SmallCNN):
            arch, width = name, model.conv1.out_channels
    return ModelSpec(arch, num_classes, image_shape[0], image_shape[1:], width, mean, std, class_names)


def is_user_code(arch: str) -> bool:
    """Whether building ``arch`` imports a module of the user's."""
    return ":" in arch and not arch.startswith("torchvision:")


def _build_net(arch: str, num_classes: int, in_channels: int, width: int | None) -> nn.Module:
    if arch in _OURS:
        own_width = {} if width is None else {"width": width}
        return _OURS[arch](num_classes, in_channels, **own_width)
    if arch == "resnet18" or arch.startswith("torchvision:"):
        return _build_torchvision(arch.removeprefix("torchvision:"), num_classes, in_channels, width)
    if arch == UNKNOWN_ARCH:
        raise InputError(
            "a model saved without its architecture's name", got=repr(arch), accepted=f"arch given as {ACCEPTED_ARCHS}"
        )
    if is_user_code(arch):
        return _build_user(arch, {"num_classes": num_classes, "in_channels": in_channels, "width": width})
    raise InputError("unknown architecture", got=repr(arch), accepted=ACCEPTED_ARCHS)


def _build_torchvision(name: str, num_classes: int, in_channels: int, width: int | None) -> nn.Module:
    models = import_torchvision().models
    # Only this module's own list: the registry also holds detectors and segmenters, which return dictionaries.
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        raise InputError("unknown torchvision classifier", got=repr(name), accepted=", ".join(classifiers))
    if in_channels != 3 or width is not None:
        raise InputError(
            f"torchvision's {name}", got=f"in_channels {in_channels}, width {width}", accepted="3 channels, no width"
        )
    options = {"aux_logits": False, "init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
    net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return net


def _build_user(arch: str, arguments: Mapping[str, int | None]) -> nn.Module:
    function = _import_function(arch)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise InputError(f"'{arch}' has no readable signature", got=error, accepted="a Python function") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {k: v for k, v in arguments.items() if v is not None and (takes_any or k in named)}
    unnamed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unnamed:
        raise InputError(
            f"'{arch}' has parameters without a value",
            got=", ".join(unnamed),
            accepted=f"a function that needs none but {', '.join(arguments)}",
        )
    try:
        model = function(**given)
    except Exception as error:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(
            f"'{arch}' fails when it is called with {shown or 'nothing'}",
            got=f"{type(error).__name__}: {error}",
            accepted="a function that returns a torch.nn.Module",
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"what '{arch}' returned", got=type(model).__name__, accepted="a torch.nn.Module")
    return model


def _import_function(arch: str) -> Callable[..., Any]:
    module_name, _, function_name = arch.partition(":")
    # The installed command does not look into the current folder, where a user's own model usually is.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # whatever the user's module does as it is imported
        got = error if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise InputError(f"architecture '{arch}' cannot be imported", got=got, accepted=ACCEPTED_ARCHS) from error
    if not callable(function):
        raise InputError(f"architecture '{arch}'", got=type(function).__name__, accepted="a function or a class")
    return function  # type: ignore[no-any-return]
