"""Numbers: image quality, overlap and surface distance of a segmentation, and statistics for paired cases.

Nothing here knows of a run or of a network.
"""

from .quality import class_dice, dice, image_quality, surface_distance_mm
from .statistics import holm, mean_and_sd, paired, paired_over_seeds

__all__ = [
    "class_dice",
    "dice",
    "holm",
    "image_quality",
    "mean_and_sd",
    "paired",
    "paired_over_seeds",
    "surface_distance_mm",
]
