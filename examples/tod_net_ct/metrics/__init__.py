"""Numbers: image quality, overlap and surface distance of a segmentation, and statistics for paired cases.

Nothing here knows of a run or of a network.
"""

from .quality import dice, dice_scores, image_quality, surface_distance_mm
from .statistics import holm, mean_and_sd, paired, paired_over_seeds

__all__ = [
    "dice",
    "dice_scores",
    "holm",
    "image_quality",
    "mean_and_sd",
    "paired",
    "paired_over_seeds",
    "surface_distance_mm",
]
