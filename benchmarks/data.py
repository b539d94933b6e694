"""Batches at the paper's sizes beside MONAI's datasets: first epoch, cached batches, memory for each volume."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Case, Options, Target, compare, without
from examples.tod_net_ct.dose import degrade
from examples.tod_net_ct.run import Settings
from examples.tod_net_ct.scans import Cases, prepare

BATCH = 4
VOXEL_MM = (1.0, 1.5, 1.5)  # slice, row, column
KEYS = ("normal", "low", "masks")
# Of the mean of all batches, for 256 columns: MONAI's grid begins at the first voxel's centre and ours at its face.
MEAN_TOLERANCE = 0.01
MEMORY_PER_VOLUME_MB = 10.0  # flat: a tenth of what a volume, its low dose and its mask hold
STATUS = Path("/proc/self/status")


def run(options: Options) -> list[Case]:
    """Dose pairs with masks as NIfTI files, resampled to 1 x 1.5 x 1.5 mm, in sub-volumes of 32 x 256 x 256."""
    n, scan, shape = (2, (24, 64, 64), (8, 32, 32)) if options.quick else (4, (80, 512, 512), (32, 256, 256))
    case = Case(f"batches of {BATCH} sub-volumes {'x'.join(map(str, shape))}, {n} volumes {'x'.join(map(str, scan))}")
    first = Case(f"first epoch: files to all batches of {n} volumes {'x'.join(map(str, scan))}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        scan_mm = (shape[0] * 2 / scan[0], *(1.5 * have / want for have, want in zip(shape[1:], scan[1:], strict=True)))
        _write_pairs(folder / "pairs", n, scan, scan_mm)
        loaders: dict[str, Any] = {"ours": lambda: _ours(folder, n, shape)}
        try:
            import monai  # noqa: F401

            loaders["MONAI PersistentDataset"] = lambda: _monai(folder, shape, persistent=True)
            loaders["MONAI CacheDataset"] = lambda: _monai(folder, shape, persistent=False)
        except ImportError:
            case.gaps.append(without("monai"))
        if not options.quick:
            run(replace(options, quick=True))  # what is imported and built once would count as the first side's memory
        made: dict[str, DataLoader] = {}
        means = {}
        for side, build in loaders.items():
            _draw(made.values(), 1)
            before = _anonymous_bytes()
            began = time.perf_counter()
            made[side] = build()
            total, count = 0.0, 0
            for low, _, _ in map(_three, made[side]):
                total, count = total + float(low.mean()), count + 1
            first.seconds[side] = [time.perf_counter() - began]
            means[side] = total / count
            gc.collect()
            first.values[f"MB in memory per volume, {side}"] = (_anonymous_bytes() - before) / n / 1e6
        first.targets.append(Target("value", "MB in memory per volume, ours", at_most=MEMORY_PER_VOLUME_MB))
        for side in list(loaders)[1:]:
            tolerance = MEAN_TOLERANCE * 256 / shape[2]
            difference = abs(means[side] - means["ours"]) / means["ours"]
            first.agreement[f"mean of the images, ours and {side}"] = (difference, tolerance)
            if not difference <= tolerance:
                raise AssertionError(f"{case.name}: expected means within {tolerance:g}, got {means}")
            for which in (first, case):
                which.targets.append(Target("seconds", "ours", side, at_most=1.0))
        n_batches = min(len(loader) for loader in made.values())
        sides = {side: (lambda loader=loader: _draw([loader], n_batches)) for side, loader in made.items()}
        compare(case, sides, options, rounds=2 if options.quick else 5)
        for side, seconds in case.seconds.items():
            case.values[f"batches per second, {side}"] = n_batches / min(seconds)
    first.notes += [
        "Ours: `prepare` and `degrade` (which copies measured pairs) to 16-bit tensors on disk, resampling once when a "
        "volume is first used, and memory-mapped slices after that.",
        "MONAI: LoadImaged, Orientationd, Spacingd, ScaleIntensityRanged, ResizeWithPadOrCropd, then "
        "RandSpatialCropSamplesd, four of each volume, so that a cached volume is read once for four sub-volumes. "
        "PersistentDataset keeps float32 on disk, CacheDataset in memory.",
        "One turn, files in the page cache; no workers on any side. Memory is what no file backs.",
    ]
    case.notes.append("Once cached. One process without workers on every side; files are in the page cache.")
    return [first, case]


def _ours(folder: Path, n: int, shape: tuple[int, int, int]) -> DataLoader:
    settings = Settings(
        data=str(folder / "pairs"), n_train=n, n_validation=0, n_test=0, shape=shape, voxel_mm=VOXEL_MM, overlap=0.5
    )
    prepare(settings, folder / "run")
    degrade(settings, folder / "run")
    return DataLoader(Cases(folder / "run", "train"), batch_size=BATCH, shuffle=True, drop_last=True)


def _monai(folder: Path, shape: tuple[int, int, int], *, persistent: bool) -> DataLoader:
    from monai import transforms as T
    from monai.data import CacheDataset, PersistentDataset, list_data_collate

    images, in_plane = ("normal", "low"), (shape[1], shape[2], -1)
    steps = T.Compose(
        [
            T.LoadImaged(KEYS),
            T.EnsureChannelFirstd(KEYS),
            T.Orientationd(KEYS, axcodes="RAS", labels=None),
            T.Spacingd(KEYS, pixdim=VOXEL_MM[::-1], mode=("bilinear", "bilinear", "nearest")),
            T.ScaleIntensityRanged(images, -200, 200, 0.0, 1.0, clip=True),
            T.ResizeWithPadOrCropd(KEYS, in_plane),
            T.RandSpatialCropSamplesd(KEYS, (shape[1], shape[2], shape[0]), num_samples=BATCH, random_size=False),
            T.ToTensord(KEYS, track_meta=False),
        ]
    )
    files = [
        {key: str(folder / "pairs" / key / path.name) for key in KEYS}
        for path in sorted((folder / "pairs" / "normal").iterdir())
    ]
    if persistent:
        cached = PersistentDataset(files, steps, cache_dir=folder / "monai")
    else:
        cached = CacheDataset(files, steps, progress=False)
    return DataLoader(cached, batch_size=1, shuffle=True, collate_fn=list_data_collate)


def _three(batch: Any) -> tuple[torch.Tensor, ...]:
    """A batch as low, normal and mask."""
    return (batch["low"], batch["normal"], batch["masks"]) if isinstance(batch, dict) else tuple(batch)


def _draw(loaders: Iterable[DataLoader], n_batches: int) -> None:
    for loader in loaders:
        for number, batch in enumerate(loader, start=1):
            _three(batch)
            if number == n_batches:
                break


def _write_pairs(folder: Path, n: int, scan: tuple[int, int, int], scan_mm: tuple[float, ...]) -> None:
    """Noisy bodies alike in every slice: means do not depend on where a sub-volume lies."""
    import nibabel as nib

    affine = np.diag([*scan_mm[::-1], 1.0])
    axes = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in scan[::-1]), indexing="ij")
    random = np.random.default_rng(0)
    for i in range(n):
        radius = np.sqrt(axes[0] ** 2 + 1.2 * axes[1] ** 2)
        normal_hu = np.where(radius < 0.8, 60 * np.cos(4 * radius), -1000)
        low_hu = normal_hu + 40 * random.standard_normal(normal_hu.shape, np.float32)
        mask = radius < 0.3
        for key, voxels in zip(KEYS, (normal_hu, low_hu, mask), strict=True):
            path = folder / key / f"p{i}_scan.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = voxels.round().astype(np.int16) if key != "masks" else voxels.astype(np.uint8)
            nib.Nifti1Image(voxels, affine).to_filename(path)


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs and that is in use; 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")), "RssAnon: 0")
    return int(line.split()[1]) * 1024
