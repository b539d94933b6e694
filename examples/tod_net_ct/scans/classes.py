"""The classes of a segmentation task as the setting `organ` names them: an organ, or an organ and what lies in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def class_names(organ: str) -> list[str]:
    """What the numbers from 1 on stand for: `"liver+tumour"` names two classes."""
    return organ.split("+")


def in_words(organ: str) -> str:
    """The classes as a sentence has them: `liver and tumour`."""
    return " and ".join(class_names(organ))


def painted(masks: Sequence[Tensor], organ: str) -> Tensor:
    """The label map (uint8) of one bool mask for each class; a later class lies over those before it.

    Raises:
        ValueError: a class vanishes below later ones, as an organ named after its tumour would hide it.
    """
    label = torch.zeros(masks[0].shape, dtype=torch.uint8)
    for number, mask in enumerate(masks, start=1):
        label[mask] = number
    for number, (name, mask) in enumerate(zip(class_names(organ), masks, strict=True), start=1):
        if mask.any() and not (label == number).any():
            raise ValueError(
                f"organ: expected every class to show, got {name!r} covered by what {organ!r} names after it; name the "
                "larger first, as in --set organ=liver+tumour"
            )
    return label
