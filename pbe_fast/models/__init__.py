"""Networks, building them by name, and what stands between them and the rest of the package."""

from __future__ import annotations

from pbe_fast.models.normalized import Normalized
from pbe_fast.models.preact_resnet import PreActResNet18
from pbe_fast.models.registry import ModelSpec, build_from_spec, build_model
from pbe_fast.models.small_cnn import SmallCNN

__all__ = ["ModelSpec", "Normalized", "PreActResNet18", "SmallCNN", "build_from_spec", "build_model"]
