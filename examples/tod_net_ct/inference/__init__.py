"""A trained network on a volume of any size, within a memory budget and equal to the whole.

The command `denoise` restores one file; `denoise_volume` and `segment` serve the stages.
"""

from .segmentation import segment
from .tiles import best_size, cut, denoise_volume, far_outside, keep_outside

__all__ = [
    "best_size",
    "cut",
    "denoise_volume",
    "far_outside",
    "keep_outside",
    "segment",
]
