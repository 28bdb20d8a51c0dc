"""Purify backdoored image classifiers, and find the poisoned training images."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe_fast import config as config
    from pbe_fast import data as data
    from pbe_fast import defenses as defenses
    from pbe_fast import errors as errors
    from pbe_fast import models as models
    from pbe_fast import runs as runs
    from pbe_fast.attack import train_infected
    from pbe_fast.config import PGDConfig, PurifyConfig
    from pbe_fast.data import ImageSet, as_image_set
    from pbe_fast.export import export_onnx, verify_onnx
    from pbe_fast.kernels.backends import available_backends
    from pbe_fast.metrics import evaluate
    from pbe_fast.models import Normalized
    from pbe_fast.poison import poison
    from pbe_fast.purify import purify
    from pbe_fast.result import PurifyResult
    from pbe_fast.scan import scan

__version__ = "0.1.0"

__all__ = [
    "ImageSet",
    "Normalized",
    "PGDConfig",
    "PurifyConfig",
    "PurifyResult",
    "as_image_set",
    "available_backends",
    "evaluate",
    "export_onnx",
    "poison",
    "purify",
    "scan",
    "train_infected",
    "verify_onnx",
]

# Where each name lives. They are imported on first use: torch takes seconds, and `pbe-fast --help` needs none of it.
_HOMES = {
    "ImageSet": "data",
    "Normalized": "models",
    "PGDConfig": "config",
    "PurifyConfig": "config",
    "PurifyResult": "result",
    "as_image_set": "data",
    "available_backends": "kernels.backends",
    "evaluate": "metrics",
    "export_onnx": "export",
    "poison": "poison",
    "purify": "purify",
    "scan": "scan",
    "train_infected": "attack",
    "verify_onnx": "export",
}
# Modules that are of use by name, likewise; the others are reached in the same way, and not listed.
_SUBMODULES = ("config", "data", "defenses", "errors", "models", "runs")


class _Package(ModuleType):
    """The package: `purify`, `poison` and `scan` are functions of it, although modules of these names exist."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            return self._submodule(name)
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def _submodule(self, name: str) -> ModuleType:
        whole = f"{self.__name__}.{name}"
        # Private names are asked for by all sorts of tools, and __main__ would start the command line.
        if name.startswith("_") or importlib.util.find_spec(whole) is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return importlib.import_module(whole)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule binds it to its name here, which would hide the function of the same name.
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__, *_SUBMODULES})


sys.modules[__name__].__class__ = _Package
