"""Stage 6: the paper's tables and figures and one page with a viewer, from what the evaluation wrote.

`paper` holds what the paper states, to be read beside a run's numbers.
"""

from .card import export
from .page import report

__all__ = [
    "export",
    "report",
]
