"""Whether an image is in the range that a network or a criterion was made for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskloss.checks import InputError, readable

_CONVENTIONS = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
_SAYS_ENOUGH = 1 / 8  # of the range; less is a flat patch, which is at home in many ranges
_LOOKS = 64  # at patches that are all nearly flat, before the check gives up for good


class RangeCheck:
    """Refuse images that clearly are in another range, until one has shown that they are not.

    Clearly means: it leaves the range by more than half its span, or it fills another convention, such as [0, 1]
    where [-1, 1] or [0, 255] is expected: black is there, more than half of the convention is used, and nothing lies
    outside. A constant, nearly constant or not finite image says nothing, and neither does one without a negative
    value where the range is symmetric about zero: the next image is looked at too. Every look costs one device sync.

    Args:
        where: The term that errors name.
        expects: The range ``(low, high)``; None checks nothing.

    Raises:
        InputError: If ``expects`` is no range.
    """

    def __init__(self, where: str, expects: tuple[float, float] | None) -> None:
        self.expects = None if expects is None else _pair(where, expects)
        self.settled = expects is None
        self._flat = 0

    def __call__(self, where: str, *images: Tensor) -> None:
        """Look at the images of one batch.

        Raises:
            InputError: If they are in another range.
        """
        images = tuple(image for image in images if image.numel() and not image.is_complex())
        if self.settled or self.expects is None or not images or not readable(*images):
            return
        ends = torch.stack([end.float() for image in images for end in torch.aminmax(image.detach())])
        numbers = ends.tolist()
        if not all(map(math.isfinite, numbers)):
            return
        least, most = min(numbers), max(numbers)
        low, high = self.expects
        if _is_elsewhere(least, most, low, high):
            raise InputError(
                where,
                f"the input spans [{least:.4g}, {most:.4g}] but [{low:g}, {high:g}] is expected; "
                "convert it with preprocess=..., or pass expects=None",
            )
        if most == least:
            return
        says_enough = most - least >= _SAYS_ENOUGH * (high - low) and not (low == -high and least >= 0)
        self._flat += not says_enough
        self.settled = says_enough or self._flat >= _LOOKS


def _is_elsewhere(least: float, most: float, low: float, high: float) -> bool:
    span = high - low
    if least < low - span / 2 or most > high + span / 2:
        return True
    others = [(bottom, top) for bottom, top in _CONVENTIONS if 64 * (top - bottom) < span]
    if low == -high:  # the step x -> 2x - 1 was forgotten, or x -> x - mean
        others += [(0.0, high), (0.0, span)] if high == 1 else [(0.0, span)]
    return any(_fills(least, most, bottom, top) for bottom, top in others)


def _fills(least: float, most: float, bottom: float, top: float) -> bool:
    span = top - bottom
    return bottom <= least <= bottom + span / 16 and least + span / 2 < most <= top


def _pair(where: str, expects: object) -> tuple[float, float]:
    if isinstance(expects, (tuple, list)) and len(expects) == 2:
        low, high = expects
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high:
            return float(low), float(high)
    raise InputError(where, f"expects must be a range (low, high) or None, got {expects!r}; for instance (0, 1)")
