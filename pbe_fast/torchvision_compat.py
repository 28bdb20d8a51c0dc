"""Importing torchvision where its wheel does not fit the installed torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from pbe_fast.errors import InputError

_MISSING_OPERATORS = ("nms", "qnms")
# The schemas vanish with the library object, so it is kept for the life of the process.
_kept: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The torchvision package, also with a CPU build of torch beside PyPI's CUDA build of torchvision.

    That pair fails at import with ``operator torchvision::nms does not exist``, although models, datasets and
    transforms need none of its compiled operators. Only after that very failure are the two missing schemas declared
    and the import tried again (``torchvision.io.decode_*`` and ``torchvision.ops.nms`` stay unusable then); a good
    installation is left alone.

    Raises:
        InputError: torchvision is not installed.
        RuntimeError: torchvision's own error, where it fails in any other way.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise InputError("this needs torchvision", got="no such package", accepted="pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    if not _kept:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _MISSING_OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    return importlib.import_module("torchvision")
