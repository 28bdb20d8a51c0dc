"""The five baselines: defences that need clean images, each called as ``defense(model, clean_data)``.

from pbe_fast import defenses
result = defenses.nad(model, clean_data)
"""

from __future__ import annotations

from typing import Any

from pbe_fast.defenses.anp import anp
from pbe_fast.defenses.base import Defense
from pbe_fast.defenses.fine_pruning import fine_prune
from pbe_fast.defenses.fine_tuning import fine_tune
from pbe_fast.defenses.nad import nad
from pbe_fast.defenses.neural_cleanse import neural_cleanse

__all__ = ["DEFENSES", "anp", "fine_prune", "fine_tune", "nad", "neural_cleanse"]

# By the name of --method; `pbe_fast.baselines.BASELINES` holds their options.
DEFENSES: dict[str, Defense[Any]] = {
    defense.method: defense for defense in (fine_tune, fine_prune, nad, neural_cleanse, anp)
}
