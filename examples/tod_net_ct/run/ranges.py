"""What each setting may be: a range of numbers or a list of words, stated when a value is out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .parsing import as_text


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, each of a tuple's; `above` leaves `low` itself out."""

    low: float
    high: float = math.inf
    above: bool = False

    def has(self, value: Any) -> bool:
        """Whether a number is in the range; NaN and infinity are in none."""
        over = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and over and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return "a finite number" + (f" above {self.low:g}" if self.above else "")
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    """One of these words."""

    words: tuple[str, ...]

    def has(self, value: Any) -> bool:
        """Whether it is one of them."""
        return value in self.words

    def __str__(self) -> str:
        return " or ".join(self.words)


_COUNT, _SIZE, _SHARE = Between(0, 1e9), Between(1, 1e9), Between(0, 1)
_WEIGHT, _RATE = Between(0, 1e6), Between(0, above=True)
_NORMS = OneOf(("instance", "batch", "none"))
RANGES: dict[str, Between | OneOf] = {
    "seed": Between(0, 2**31 - 1),
    **dict.fromkeys(("n_train", "n_validation", "n_test", "epochs", "workers", "task_validate_every"), _COUNT),
    "split": _SHARE,
    "overlap": Between(0, 0.95),
    "shape": Between(1, 4096),
    "patch": Between(0, 4096),
    "voxel_mm": Between(0.01, 100),
    "i0_photons": Between(0, 1e12, above=True),
    "electronic_noise_photons": Between(0, 1e6),
    "n_views": Between(1, 100_000),
    "dose_fraction": _SHARE,
    **dict.fromkeys(("task_steps", "steps", "validate_every", "save_every", "critic_steps", "nodes"), _SIZE),
    **dict.fromkeys(("task_width", "width", "critic_channels"), Between(1, 4096)),
    **dict.fromkeys(("task_batch", "batch"), Between(1, 100_000)),
    **dict.fromkeys(("task_learning_rate", "learning_rate"), _RATE),
    **dict.fromkeys(("weight_adv", "weight_task", "weight_mse", "weight_perceptual", "penalty_weight"), _WEIGHT),
    **dict.fromkeys(("share_adv", "share_task", "share_mse", "share_perceptual"), _WEIGHT),
    "clip": Between(0, 1e3, above=True),
    "jobs": Between(-1, 1e4),
    "route": OneOf(("fast", "catsim")),
    "task_dose": OneOf(("normal", "low")),
    "dice": OneOf(("batch", "sample")),
    "norm": _NORMS,
    "critic_norm": _NORMS,
    "final_activation": OneOf(("none", "tanh")),
    "perceptual_network": OneOf(("efficientnet", "vgg19")),
    "optimizer": OneOf(("adam", "rmsprop")),
    "select_best": OneOf(("mse", "dice")),
    "accelerator": OneOf(("auto", "cpu", "gpu", "cuda", "mps")),
    "precision": OneOf(("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")),
}
_MOST_VOXELS = 2**28  # of a training sub-volume: four times the paper's on every axis
_MOST_NAMES = 64


def check_ranges(values: Mapping[str, Any], standard: Any) -> None:
    """Refuse a value out of its field's range; a number of a field without one has at least to be finite.

    Args:
        values: by field.
        standard: settings whose values are the examples.

    Raises:
        ValueError: naming the field, its range and the value.
    """
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        numbers = [part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)]
        allowed = RANGES.get(name, Between(-math.inf) if numbers else None)
        checked = parts if isinstance(allowed, OneOf) else numbers
        if len(parts) > _MOST_NAMES or (allowed is not None and not all(allowed.has(part) for part in checked)):
            raise ValueError(
                f"--set {name}: expected {allowed or f'at most {_MOST_NAMES} names'}, got {as_text(value)[:80]}; "
                f"for example {name}={as_text(getattr(standard, name))}"
            )
    if math.prod(values.get("shape", ())) > _MOST_VOXELS:
        raise ValueError(
            f"--set shape: expected at most {_MOST_VOXELS:,} voxels, got {as_text(values['shape'])}; for example "
            f"shape={as_text(standard.shape)}"
        )
