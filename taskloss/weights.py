"""A term's weight: a finite number, or a schedule that gives one at each step of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from taskloss.checks import InputError

Weight = float | Callable[[int], float]


def at_step(name: str, weight: Weight, step: int | None) -> float:
    """The number that a weight is at a step of training; errors carry the term's ``name``."""
    if not callable(weight):
        return weight
    if step is None:
        raise InputError(name, "its weight is a schedule, but step is None; call loss(x_hat, ..., step=i)")
    value = weight(step)
    check_weight(name, value)
    return float(value)


def check_weight(name: str, weight: object) -> None:
    """Refuse anything but a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise InputError(name, f"its weight must be a finite number or a callable of the step, got {weight!r}")


def product(name: str, left: Weight, right: Weight) -> Weight:
    """Two weights multiplied: a schedule if either is one."""
    if callable(left) or callable(right):
        return _Product(left, right)
    check_weight(name, right)
    return left * right


@dataclass(frozen=True)
class _Product:
    """Two weights multiplied, at least one of them a schedule; a class, so that it can be pickled."""

    left: Weight
    right: Weight

    def __call__(self, step: int) -> float:
        left = self.left(step) if callable(self.left) else self.left
        right = self.right(step) if callable(self.right) else self.right
        return left * right
