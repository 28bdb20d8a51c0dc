"""Networks, building them by name, and what stands between them and the rest of the package."""

from __future__ import annotations

from pbe_fast.models.adapters import batch_norms, conv_stages, features, last_linear, outputs_of
from pbe_fast.models.check import check_batch, check_differentiable, check_model, check_module, check_trainable
from pbe_fast.models.io import load_model, save_model
from pbe_fast.models.normalized import Normalized
from pbe_fast.models.preact_resnet import PreActResNet18
from pbe_fast.models.registry import ModelSpec, build_from_spec, build_model, spec_of
from pbe_fast.models.small_cnn import SmallCNN

__all__ = [
    "ModelSpec",
    "Normalized",
    "PreActResNet18",
    "SmallCNN",
    "batch_norms",
    "build_from_spec",
    "build_model",
    "check_batch",
    "check_differentiable",
    "check_model",
    "check_module",
    "check_trainable",
    "conv_stages",
    "features",
    "last_linear",
    "load_model",
    "outputs_of",
    "save_model",
    "spec_of",
]
