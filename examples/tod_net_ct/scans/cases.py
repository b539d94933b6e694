"""Batches for training: low dose, normal dose and mask on the unit scale, streamed from the prepared files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..dose import to_unit
from ..run import check_intact, is_intact, load_tensors, read_json, save_tensors
from .classes import class_names
from .grid import OUTSIDE_HU, crop_or_pad, resample, sub_volume_starts, training_grid
from .preparation import cases_of, grid_of


class Cases(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """One split: ``low``, ``normal`` (float32 in [0, 1]) and ``mask`` (uint8, 0 for background), each ``(1, D, H, W)``.

    Training items are sub-volumes of ``shape`` on the training grid, overlapping along the body and filled up with air
    where a scan ends. A scan of another voxel size is resampled when it is first used, and kept in
    ``grid/<key>/<case>.pt``. Validation and test items are whole cases on their own grid, never placed by the label.
    Only the slices of an item are read, so memory does not grow with the number of cases.

    Attributes:
        paths: The cases' files; `in_hu` counts them, and for validation and test `__getitem__` does, too.
        class_names: What the mask's numbers from 1 on are called.
        items: For each training item its case and its first slice.
    """

    def __init__(self, run: Path, split: str) -> None:
        self.run = run
        self.split = split
        _text(run / "cases" / "manifest.json")  # says in one sentence that the stage is to be run first
        for stage in ("cases", "low_dose"):
            check_intact(run / stage)
        self.paths = cases_of(run / "cases", split)
        manifest = read_json(run / "cases" / "manifest.json")
        try:
            facts, self._about = manifest["facts"], manifest["results"]["cases"]
            self.shape: tuple[int, int, int] = tuple(facts["shape"])
            self.voxel_mm: tuple[float, float, float] = tuple(facts["voxel_mm"])
            self.class_names: list[str] = class_names(facts["organ"])
        except (KeyError, TypeError, AttributeError) as error:
            folder = run / "cases"
            raise ValueError(
                f"{folder / 'manifest.json'}: expected a stage's manifest, got a damaged file; remove the folder "
                f"{folder} and start again"
            ) from error
        self._looked_at: set[Path] = set()  # resampled cases that are known to be whole
        self.items = [(i, 0) for i in range(len(self.paths))]
        if split == "train":
            self.items = [
                (i, start)
                for i, path in enumerate(self.paths)
                for start in sub_volume_starts(
                    self._about[path.stem]["training_slices"], self.shape[0], facts["overlap"]
                )
            ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        number, start = self.items[index]
        if self.split != "train":
            normal_hu, low_hu, mask = self.in_hu(number)
            return to_unit(low_hu)[None], to_unit(normal_hu)[None], mask[None]
        case = self._on_training_grid(self.paths[number])
        stop = start + self.shape[0]
        normal_hu, low_hu, mask = (
            crop_or_pad(case[name][start:stop], self.shape, fill)
            for name, fill in (("normal_hu", OUTSIDE_HU), ("low_hu", OUTSIDE_HU), ("mask", 0))
        )
        return to_unit(low_hu)[None], to_unit(normal_hu)[None], mask.clone()[None]  # nothing keeps the file open

    def in_hu(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """A whole case on its own grid: normal dose and low dose in HU, and the mask, each ``(D, H, W)``."""
        case = self._original(self.paths[number])
        return case["normal_hu"].float(), case["low_hu"].float(), case["mask"].clone()

    def voxel_mm_of(self, number: int) -> tuple[float, ...]:
        """The voxel size of a whole case, ``(dz, dy, dx)``."""
        return tuple(load_tensors(self.paths[number], mmap=True)["voxel_mm"].tolist())

    def _original(self, path: Path) -> dict[str, Tensor]:
        case = load_tensors(path, mmap=True)
        if "low_hu" not in case:
            case["low_hu"] = load_tensors(self.run / "low_dose" / path.name, mmap=True)["low_hu"]
        return case

    def _on_training_grid(self, path: Path) -> dict[str, Tensor]:
        if self._about[path.stem]["on_training_grid"]:
            return self._original(path)
        kept = self._cache / path.name
        if not kept.is_file() or not (kept in self._looked_at or is_intact(kept)):  # a damaged one is made again
            self._drop_old_caches()
            case = self._original(path)
            source = grid_of(case)
            target = training_grid(source, self.voxel_mm, self.shape[1:])
            low_hu, normal_hu = (
                resample(case[name].float(), source, target, fill=OUTSIDE_HU).round().to(torch.int16)
                for name in ("low_hu", "normal_hu")
            )
            mask = resample(case["mask"], source, target, fill=0, nearest=True)
            save_tensors(kept, normal_hu=normal_hu, low_hu=low_hu, mask=mask)  # whole or not: two processes may meet
        self._looked_at.add(kept)
        return load_tensors(kept, mmap=True)

    @functools.cached_property
    def _cache(self) -> Path:
        """Named by what it is made from, so that nothing stale is ever found."""
        manifests = [self.run / stage / "manifest.json" for stage in ("cases", "low_dose")]
        key = hashlib.sha256("".join(_text(path) for path in manifests if path.is_file()).encode()).hexdigest()[:16]
        return self.run / "grid" / key

    def _drop_old_caches(self) -> None:
        with contextlib.suppress(OSError):  # another process may be at it
            for folder in self._cache.parent.iterdir():
                if folder != self._cache:
                    shutil.rmtree(folder, ignore_errors=True)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ValueError(f"{path}: expected the finished stage {path.parent.name!r}, got none; run it first") from error
