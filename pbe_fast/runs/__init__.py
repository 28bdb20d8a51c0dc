"""Runs as folders: what an attack and a purification leave in one, and what the next step finds there."""

from __future__ import annotations

from pbe_fast.runs.folder import (
    Clock,
    add_to_report,
    describe_inputs,
    illustrate,
    models_of,
    provenance,
    save_infected,
)
from pbe_fast.runs.networks import (
    measure,
    measure_cover,
    name_models,
    new_model,
    open_model,
    rank_with,
    require_size,
    spec_for,
)
from pbe_fast.runs.sources import (
    Source,
    purification_sets,
    require_same_kind,
    require_true_labels,
    reserve,
    shared_names,
    sizes_of,
)
from pbe_fast.runs.triggers import load_trigger, save_trigger_weights

__all__ = [
    "Clock",
    "Source",
    "add_to_report",
    "describe_inputs",
    "illustrate",
    "load_trigger",
    "measure",
    "measure_cover",
    "models_of",
    "name_models",
    "new_model",
    "open_model",
    "provenance",
    "purification_sets",
    "rank_with",
    "require_same_kind",
    "require_size",
    "require_true_labels",
    "reserve",
    "save_infected",
    "save_trigger_weights",
    "shared_names",
    "sizes_of",
    "spec_for",
]
