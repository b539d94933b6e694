"""Low dose from normal dose: a projector, the physics of the photons, and a full scanner simulation beside it.

Stage 2 (`degrade`) writes the low-dose counterpart of every prepared case.
"""

from .degradation import case_seed, check, degrade, numbered_cases, simulate_volume, voxel_of
from .projector import ParallelBeam
from .simulate import low_dose

__all__ = [
    "ParallelBeam",
    "case_seed",
    "check",
    "degrade",
    "low_dose",
    "numbered_cases",
    "simulate_volume",
    "voxel_of",
]
