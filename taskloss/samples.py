"""What belongs to which sample of a batch, whatever nest and axis order a network gives it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskloss.trees import lent, tensors_in
from taskloss.watching import close, image_in


def first_twice(example: Any) -> Any:
    """The same inputs for a batch that holds the first sample twice."""
    image = image_in(example)
    assert image is not None  # audit_task_model has looked
    n = image.shape[0]

    def twice(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value[:1]] * 2) if value.dim() and value.shape[0] == n else value.clone()
        if isinstance(value, list) and len(value) == n:
            return [lent(value[0]), lent(value[0])]
        if isinstance(value, Mapping):
            return {key: twice(inner) for key, inner in value.items()}
        return tuple(twice(inner) for inner in value) if type(value) is tuple else value

    return twice(example)


def first_sample_agrees(alike: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Whether the first of two samples has the same part in both, along whichever axis the samples lie."""
    if isinstance(alike, (list, tuple)) and len(alike) == 2 and all_close(alike[0], other[0], tolerance):
        return True  # one entry for each sample
    a, b = list(tensors_in(alike)), list(tensors_in(other))
    return len(a) == len(b) and all(_halves_agree(s, t, tolerance) for s, t in zip(a, b, strict=True))


def _halves_agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.dim() == 0 or a.is_nested or close(a, b, tolerance):
        return True  # a number for the whole batch says nothing
    if a.dim() != b.dim():
        return False
    for axis, size in enumerate(a.shape):
        half = size // 2
        if size % 2 == 0 and b.shape[axis] >= half > 0:
            if close(a.narrow(axis, 0, half), b.narrow(axis, 0, half), tolerance):
                return True
            places = torch.arange(0, size, 2, device=a.device)
            if a.shape == b.shape and close(a.index_select(axis, places), b.index_select(axis, places), tolerance):
                return True
    return False


def all_close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two nests hold as many tensors, and equal ones."""
    left, right = list(tensors_in(a)), list(tensors_in(b))
    return len(left) == len(right) and all(close(s, t, tolerance) for s, t in zip(left, right, strict=True))
