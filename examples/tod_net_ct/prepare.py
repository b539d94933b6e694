"""Stage 1: cases on the training grid, from seeded phantoms or from real scans, split by patient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .phantoms import abdominal_phantom, organ_mask
from .settings import Settings
from .stage import begin, finish, is_done, progress, save_tensors
from .volumes import Case, find_cases, read_label, read_scan

SPLITS = ("train", "validation", "test")


def prepare(settings: Settings, run: Path) -> Path:
    """Write ``cases/<split>-<number>.pt`` with ``normal_hu`` (int16) and ``mask`` (uint8), both ``(D, H, W)``.

    Raises:
        ValueError: for a folder without cases, or fewer cases than the splits need.
    """
    folder = run / "cases"
    names = ("seed", "data", "organ", "n_train", "n_validation", "n_test", "shape", "voxel_mm")
    facts = {name: getattr(settings, name) for name in names}
    if is_done(folder, facts):
        return folder
    counts = {"train": settings.n_train, "validation": settings.n_validation, "test": settings.n_test}
    total = sum(counts.values())
    source = _from_folder(settings, total) if settings.data else _phantoms(settings, total)
    begin(folder)
    places = [f"{split}-{i:03d}" for split in SPLITS for i in range(counts[split])]
    origin = {}
    for place, (name, normal_hu, mask) in zip(places, progress(source, "prepare cases", total), strict=True):
        save_tensors(folder / f"{place}.pt", normal_hu=normal_hu.round().to(torch.int16), mask=mask.to(torch.uint8))
        origin[place] = name
    finish(folder, facts, origin=origin)
    return folder


def cases_of(folder: Path, split: str) -> list[Path]:
    """The files of one split, in order."""
    return sorted(folder.glob(f"{split}-*.pt"))


def _phantoms(settings: Settings, total: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    for i in range(total):
        seed = 100_000 * settings.seed + i
        phantom = abdominal_phantom(seed, settings.shape, settings.voxel_mm)
        yield f"phantom {seed}", phantom.volume_hu, organ_mask(phantom.label, settings.organ)


def _from_folder(settings: Settings, total: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    cases = find_cases(settings.data)
    if len(cases) < total:
        raise ValueError(
            f"{settings.data}: holds {len(cases)} cases but the splits need {total}; "
            "lower them with --set n_train=... --set n_validation=... --set n_test=..."
        )
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(settings.seed))
    for i in order[:total].tolist():
        yield cases[i].name, *_on_grid(cases[i], settings)


def _on_grid(case: Case, settings: Settings) -> tuple[Tensor, Tensor]:
    """A scan and its mask, resampled to the voxel size and centre cropped or padded with air to the shape."""
    scan = read_scan(case.scan)
    mask = (read_label(case.label, like=scan) > 0).float()
    size = [
        max(1, round(n * a / b)) for n, a, b in zip(scan.volume_hu.shape, scan.voxel_mm, settings.voxel_mm, strict=True)
    ]
    volume = F.interpolate(scan.volume_hu[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    mask = F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]
    return _fit(volume, settings.shape, -1024.0), _fit(mask, settings.shape, 0.0)


def _fit(volume: Tensor, shape: tuple[int, int, int], fill: float) -> Tensor:
    for axis, (have, want) in enumerate(zip(volume.shape, shape, strict=True)):
        if have > want:
            volume = volume.narrow(axis, (have - want) // 2, want)
    padding = [
        pad
        for have, want in zip(volume.shape, shape, strict=True)
        for pad in ((want - have) // 2, (want - have + 1) // 2)
    ]
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    return F.pad(volume, [p for pair in reversed(pairs) for p in pair], value=fill)
