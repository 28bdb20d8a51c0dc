"""Purify backdoored image classifiers, and find the poisoned training images."""

from __future__ import annotations

from pbe_fast.attack import train_infected
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.export import export_onnx, verify_onnx
from pbe_fast.kernels.backends import available_backends
from pbe_fast.metrics import evaluate
from pbe_fast.models import Normalized
from pbe_fast.poison import poison
from pbe_fast.purify import purify
from pbe_fast.result import PurifyResult

__version__ = "0.1.0"

__all__ = [
    "ImageSet",
    "Normalized",
    "PurifyConfig",
    "PurifyResult",
    "as_image_set",
    "available_backends",
    "evaluate",
    "export_onnx",
    "poison",
    "purify",
    "train_infected",
    "verify_onnx",
]
