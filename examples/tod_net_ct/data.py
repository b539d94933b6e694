"""Batches for training: low dose, normal dose and mask on the unit scale, streamed from the prepared files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from .prepare import cases_of
from .stage import load_tensors
from .volumes import to_unit


class Cases(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """One split: ``low``, ``normal`` (float32 in [0, 1]) and ``mask`` (uint8), each ``(1, D, H, W)``."""

    def __init__(self, run: Path, split: str) -> None:
        self.low_dose = run / "low_dose"
        self.paths = cases_of(run / "cases", split)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        normal_hu, low_hu, mask = self.in_hu(index)
        return to_unit(low_hu)[None], to_unit(normal_hu)[None], mask[None]

    def in_hu(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normal dose and low dose in HU, and the mask, each ``(D, H, W)``."""
        path = self.paths[index]
        case = load_tensors(path)
        low_hu = load_tensors(self.low_dose / path.name)["low_hu"]
        return case["normal_hu"].float(), low_hu.float(), case["mask"]
