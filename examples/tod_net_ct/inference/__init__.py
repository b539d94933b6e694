"""A trained network on a volume of any size, within a memory budget and equal to the whole.

The command `denoise` restores one file; `denoise_volume` and `segment` serve the stages.
"""

from .memory import MEMORY_GB, PROGRAM_GB, features_gib
from .segmentation import segment
from .tiles import cut, denoise_volume, far_outside, keep_outside, tile_size

__all__ = [
    "MEMORY_GB",
    "PROGRAM_GB",
    "cut",
    "denoise_volume",
    "far_outside",
    "features_gib",
    "keep_outside",
    "segment",
    "tile_size",
]
