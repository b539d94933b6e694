"""Stage 5: every denoiser on every test case, by image quality and by every task network, in numbers.

What is printed of these numbers is the report's matter; the command `pairs` measures real pairs of doses.
"""

from .names import heading, title
from .pairs import compare, measure_pairs
from .scores import (
    LOWER_IS_BETTER,
    ORACLE,
    QUALITY,
    REFERENCE,
    Row,
    device_of,
    evaluate,
    figure_loss,
    guide_of,
    half_trained,
    judges,
    measure_case,
    read_rows,
    read_summary,
    training_view,
    values_of,
)

__all__ = [
    "LOWER_IS_BETTER",
    "ORACLE",
    "QUALITY",
    "REFERENCE",
    "Row",
    "compare",
    "device_of",
    "evaluate",
    "figure_loss",
    "guide_of",
    "half_trained",
    "heading",
    "judges",
    "measure_case",
    "measure_pairs",
    "read_rows",
    "read_summary",
    "title",
    "training_view",
    "values_of",
]
