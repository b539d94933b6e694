"""The HU window of the paper, and the unit scale on which networks work."""

from __future__ import annotations

import math

from torch import Tensor

WINDOW_HU = (-200.0, 200.0)


def to_unit(volume_hu: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Clamp HU to a window and scale it to [0, 1] (the paper's section 3.3).

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return (volume_hu - lower).div_(upper - lower).clamp_(0, 1)  # one new volume, not three


def to_hu(unit: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Scale [0, 1] back to HU; the inverse of `to_unit` inside the window, and no clamp.

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return unit * (upper - lower) + lower


def _bounds(window_hu: tuple[float, float]) -> tuple[float, float]:
    lower, upper = window_hu
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise ValueError(f"window_hu: expected (lower, upper) in HU, got {window_hu}; for example (-200, 200)")
    return lower, upper
