"""The physics: HU and their window, a projector, photons and their noise, and a full scanner simulation beside them.

Stage 2 (`degrade`) writes the low-dose counterpart of every prepared case.
"""

from .degradation import case_seed, check, check_dose, degrade, numbered_cases, simulate_volume, voxel_of
from .projector import ParallelBeam
from .simulate import low_dose
from .window import WINDOW_HU, to_hu, to_unit

__all__ = [
    "ParallelBeam",
    "WINDOW_HU",
    "case_seed",
    "check",
    "check_dose",
    "degrade",
    "low_dose",
    "numbered_cases",
    "simulate_volume",
    "to_hu",
    "to_unit",
    "voxel_of",
]
