"""Fine-tuning on clean images: what anybody would try first."""

from __future__ import annotations

from pbe_fast.baselines import FineTuningConfig
from pbe_fast.defenses.base import Defense, Work


class FineTuning(Defense[FineTuningConfig]):
    """SGD with a cosine schedule over all weights, on the clean images alone."""

    method = "ft"

    def run(self, work: Work, config: FineTuningConfig) -> None:
        """Steps like PBE's step 2, and no other."""
        work.fine_tune(work.clean, config.finetune, epochs=config.epochs, min_updates=config.min_updates)


fine_tune = FineTuning()
