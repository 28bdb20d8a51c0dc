"""Every option of the package but the baselines', as frozen dataclasses with defaults that work.

The command line builds its flags from these fields (``help`` and ``choices`` in their metadata), and reports
store them as `pbe_fast.options.to_dict` gives them.
"""

from pbe_fast.config.infection import AttackConfig, InputAwareConfig
from pbe_fast.config.purification import PurifyConfig
from pbe_fast.config.scanning import ScanConfig
from pbe_fast.config.steps import FineTuneConfig, PGDConfig, TrainingConfig, WaveConfig

__all__ = [
    "AttackConfig",
    "FineTuneConfig",
    "InputAwareConfig",
    "PGDConfig",
    "PurifyConfig",
    "ScanConfig",
    "TrainingConfig",
    "WaveConfig",
]
