"""Stage 1: whole cases in one format, from seeded phantoms or from real scans, split by patient.

Scans stay on their own grid, in the working orientation of `Scan`; `Cases` brings them onto the training grid.
One case is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dose import check_dose, simulate_volume
from ..run import (
    Data,
    Dose,
    Patches,
    Seed,
    Settings,
    Split,
    begin,
    decisive,
    finish,
    is_done,
    one_thread,
    only,
    progress,
    save_tensors,
)
from .classes import class_names, painted
from .grid import Grid, is_on_grid, training_grid
from .layouts import Case, find_cases, organ_labels
from .phantoms import abdominal_phantom, organ_mask
from .read import read_label, read_low_dose, read_scan
from .splits import SPLITS, shared_patients, split_patients

NORMAL_DOSE_SEED = 2_000_000_011  # plus the phantom's number: far from the seeds of the low dose


class Source(NamedTuple):
    """A case before it is read."""

    name: str
    patient: str
    files: tuple[Path, ...]
    read: Callable[[], dict[str, Tensor]]


def prepare(settings: Settings, run: Path) -> Path:
    """Write ``cases/<split>-<number>.pt`` with ``normal_hu`` (int16), ``mask`` (uint8), both ``(D, H, W)``, and
    ``voxel_mm`` (float32); for scans also ``affine`` (slice, row, column to mm) and, for real dose pairs, ``low_hu``.

    The manifest tells the origin and the patient of every case, and warns where patients serve in several splits.

    Raises:
        ValueError: for a folder without cases, fewer patients than the splits need, or a case that cannot be used.
    """
    folder = run / "cases"
    noisy = not settings.data and settings.dose_fraction > 0
    settings = only(settings, Seed, Data, Patches, *([Split] if settings.data else [Dose] if noisy else []))
    facts = decisive(settings)
    if noisy:
        check_dose(settings)
    if not 0 <= settings.overlap < 1:
        raise ValueError(f"overlap: expected a share from 0 to below 1, got {settings.overlap}; --set overlap=0.5")
    for name in () if settings.data else (f"n_{split}" for split in SPLITS):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: expected at least 1 phantom, got {getattr(settings, name)}; --set {name}=4")
    sources = _scans(settings) if settings.data else _phantoms(settings, noisy)
    facts["files"] = {str(path): _stamp(path) for source in sources for path in source.files}
    if is_done(folder, facts):
        return folder
    dealt = _deal(sources, settings)
    go_on = begin(folder, facts)
    cases: dict[str, Any] = {}
    places = [(split, i, len(own), source) for split, own in dealt.items() for i, source in enumerate(own)]
    for split, i, n, source in progress(places, "prepare cases"):
        path = folder / f"{split}-{i:0{max(3, len(str(n - 1)))}d}.pt"
        if not (go_on and path.exists()):
            save_tensors(path, **source.read())
        cases[path.stem] = {"origin": source.name, "patient": source.patient} | _describe(path, settings)
        cases[path.stem]["digests"] = {file.name: _digest(file) for file in source.files}
    shared = shared_patients({split: list({source.patient for source in own}) for split, own in dealt.items()})
    warning = f"for trying out only: {', '.join(shared)} served in more than one split" if shared else ""
    finish(folder, facts, cases=cases, warning=warning)
    return folder


def cases_of(folder: Path, split: str) -> list[Path]:
    """The files of one split, in order."""
    return sorted(folder.glob(f"{split}-*.pt"))


def grid_of(case: dict[str, Tensor]) -> Grid:
    """Where the voxels of a prepared case lie."""
    depth, height, width = case["normal_hu"].shape
    affine = case["affine"] if "affine" in case else torch.diag(torch.cat([case["voxel_mm"].double(), torch.ones(1)]))
    return Grid(affine.numpy(), (depth, height, width))


def _deal(sources: list[Source], settings: Settings) -> dict[str, list[Source]]:
    if not settings.data:
        counts = (settings.n_train, settings.n_validation, settings.n_test)
        stops = [sum(counts[: i + 1]) for i in range(3)]
        return {s: sources[b - n : b] for s, n, b in zip(SPLITS, counts, stops, strict=True)}
    dealt = split_patients([source.patient for source in sources], settings)
    return {s: [x for patient in own for x in sources if x.patient == patient] for s, own in dealt.items()}


def _phantoms(settings: Settings, noisy: bool) -> list[Source]:
    counts = (settings.n_train, settings.n_validation, settings.n_test)
    if settings.n_train < 1 or min(counts) < 0:
        raise ValueError(
            f"n_train: expected at least 1 phantom, got {settings.n_train} of {counts}; n_train=0 splits a folder of "
            "scans, which --set data=FOLDER gives"
        )

    def source(seed: int) -> Source:
        return Source(f"phantom {seed}", f"phantom {seed}", (), partial(_read_phantom, seed, settings, noisy))

    return [source(100_000 * settings.seed + i) for i in range(sum(counts))]


def _read_phantom(seed: int, settings: Settings, noisy: bool) -> dict[str, Tensor]:
    """A patient, scanned at the full dose where stage 2 is to leave a part of that: a real scan is never free of noise,
    and a network that has seen none falls at the first.
    """
    phantom = abdominal_phantom(seed, settings.shape, settings.voxel_mm)
    mask = painted([organ_mask(phantom.label, name) for name in class_names(settings.organ)], settings.organ)
    volume_hu = phantom.volume_hu
    if noisy:
        with one_thread():
            full = replace(settings, dose_fraction=0.0)
            volume_hu = simulate_volume(volume_hu, settings.voxel_mm, full, NORMAL_DOSE_SEED + seed)["low_hu"].float()
    return _tensors(volume_hu, mask, settings.voxel_mm)


def _scans(settings: Settings) -> list[Source]:
    sources = []
    for case in find_cases(settings.data):
        files = tuple(path for path in (case.scan, case.label, case.low) if path is not None)
        numbers = [organ_labels(case, name) for name in class_names(settings.organ)]  # a wrong one is told at once
        if len(numbers) > 1 and None in numbers:
            raise ValueError(
                f"{case.name}: expected a data set that says what its labels are, got {settings.organ!r} for one that "
                "does not; give label numbers such as --set organ=1,2+2"
            )
        sources.append(Source(case.name, case.patient, files, partial(_read_scan, case, settings, numbers)))
    return sources


def _read_scan(case: Case, settings: Settings, numbers: Sequence[tuple[int, ...] | None]) -> dict[str, Tensor]:
    try:
        scan = read_scan(case.scan, assume_hu=settings.assume_hu)
        mask = torch.zeros(scan.volume_hu.shape, dtype=torch.uint8)
        if case.label is not None:
            label = read_label(case.label, scan, allow_empty=case.low is not None)  # a single slice may lack the organ
            masks = [label > 0 if n is None else torch.isin(label, torch.tensor(n, dtype=label.dtype)) for n in numbers]
            mask = painted(masks, settings.organ)
            if not mask.any() and case.low is None:
                raise ValueError(
                    f"{case.label.name}: expected the organ {settings.organ!r} (labels {_list(numbers[0] or ())}), got "
                    f"labels {_list(label.unique().tolist())}; take the case out, or pick label numbers with "
                    "--set organ=1,2"
                )
        tensors = _tensors(scan.volume_hu, mask, scan.voxel_mm)
        tensors["affine"] = torch.from_numpy(scan.grid_affine)
        if case.low is not None:
            tensors["low_hu"] = _to_int16(read_low_dose(case.low, scan, assume_hu=settings.assume_hu).volume_hu)
    except ValueError as error:
        if case.name in str(error):
            raise
        raise ValueError(f"{case.name}: {error}") from error  # KiTS calls every file imaging.nii.gz
    return tensors


def _tensors(volume_hu: Tensor, mask: Tensor, voxel_mm: tuple[float, float, float]) -> dict[str, Tensor]:
    return {"normal_hu": _to_int16(volume_hu), "mask": mask, "voxel_mm": torch.tensor(voxel_mm)}


def _to_int16(volume_hu: Tensor) -> Tensor:
    return volume_hu.round().clamp(-32768, 32767).to(torch.int16)


def _describe(path: Path, settings: Settings) -> dict[str, Any]:
    """What is needed to plan sub-volumes without opening the case again."""
    case = torch.load(path, weights_only=True, mmap=True)
    own = grid_of(case)
    on_grid = is_on_grid(own, settings.voxel_mm)
    n_slices = own.shape[0] if on_grid else training_grid(own, settings.voxel_mm, settings.shape[1:]).shape[0]
    return {
        "shape": own.shape,
        "voxel_mm": [round(float(mm), 4) for mm in case["voxel_mm"]],
        "on_training_grid": on_grid,
        "training_slices": n_slices,
    }


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stamp(path: Path) -> list[int]:
    """Size and time of a file, or of the slices of a series: a changed input is read anew."""
    stats = [file.stat() for file in _files(path)]
    return [sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    for file in _files(path):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
