"""A data set on coarser voxels around the body, for trainings that a CPU can pay for: means, never single samples."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..run import replacing, write_text
from .layouts import find_cases
from .read import read_label, read_scan

BODY_HU = -300.0  # above is no air
MARGIN = 4  # voxels of air kept around the body


def mean_over_voxels(volume: np.ndarray, voxel_mm: Sequence[float], target_mm: Sequence[float]) -> np.ndarray:
    """The mean of a volume over the extent of each new voxel, centred; linear between centres where those are finer.

    Averaging keeps what a coarse scan would have seen, noise included; reading every n-th voxel would keep all noise.

    Shape:
        `(D, H, W)` to the number of whole new voxels along each axis.
    """
    result = volume.astype(np.float64)
    for axis, (own, want) in enumerate(zip(voxel_mm, target_mm, strict=True)):
        n = result.shape[axis]
        m = max(1, int(n * own / want + 1e-6))
        edges = np.arange(m + 1) * want / own + (n - m * want / own) / 2
        if want < own:
            points, values = (edges[:-1] + edges[1:]) / 2 - 0.5, result
            result = _read(values, points.clip(0, n - 1), axis)
        else:
            sums = np.concatenate([np.zeros_like(np.take(result, [0], axis)), result.cumsum(axis)], axis)
            result = np.diff(_read(sums, edges.clip(0, n), axis), axis=axis) * own / want
    return result


def coarser_copy(
    data: Path,
    folder: Path,
    voxel_mm: tuple[float, float, float] | None,
    patients: Mapping[str, Sequence[str]],
    left_out: Sequence[str] = (),
) -> Path:
    """Write a folder of scans in LiTS's layout with `patients.csv`: every scan cropped to the body and averaged onto
    `voxel_mm` (a label is what fills most of a voxel), or links to the files as they are for None. Cases that are
    `left_out` are not copied.

    Raises:
        ValueError: a case belongs to no patient and is not left out, or a patient's case is not there.
    """
    cases = {case.name: case for case in find_cases(data)}
    if unknown := sorted(set(left_out) - set(cases)):
        raise ValueError(f"{data}: expected left_out to name its cases, got {', '.join(unknown)}; take them out of it")
    cases = {name: case for name, case in cases.items() if name not in left_out}
    owners = {case: patient for patient, own in patients.items() for case in own}
    if set(cases) != set(owners):
        apart = ", ".join(sorted(set(cases) ^ set(owners)))
        raise ValueError(
            f"{data}: expected every case under one patient, got {apart} in one list alone; or name them in left_out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        if case.label is None:
            raise ValueError(f"{name}: expected a segmentation, got none; take the case out")
        number = name.rpartition("-")[2]
        for path, role in ((case.scan, "volume"), (case.label, "segmentation")):
            target = folder / f"{role}-{number}{_suffix(path)}"
            if voxel_mm is None and not target.exists():
                os.symlink(path.resolve(), target)
        if voxel_mm is not None and not (folder / f"segmentation-{number}.nii.gz").exists():
            _write_coarser(case.scan, case.label, folder, number, voxel_mm)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((name, owners[name]) for name in cases)
    write_text(folder / "patients.csv", text.getvalue())
    return folder


def _write_coarser(scan: Path, label: Path, folder: Path, number: str, voxel_mm: tuple[float, float, float]) -> None:
    import nibabel as nib

    read = read_scan(scan)
    labels, volume = read_label(label, read).numpy(), read.volume_hu.numpy()
    body = _body(volume)
    volume, labels = volume[body], labels[body]
    shares = np.stack([mean_over_voxels(labels == i, read.voxel_mm, voxel_mm) for i in range(int(labels.max()) + 1)])
    organ = shares[1:].sum(0) >= 0.5  # then the label that has most of it
    found = np.where(organ, 1 + shares[1:].argmax(0), 0).astype(np.uint8)
    means = mean_over_voxels(volume, read.voxel_mm, voxel_mm).round().astype(np.int16)
    affine = np.diag([-voxel_mm[2], -voxel_mm[1], voxel_mm[0], 1.0])  # columns left, rows back, slices up: LPS in RAS
    for role, values in (("volume", means), ("segmentation", found)):  # the label last: it tells that both are there
        with replacing(folder / f"{role}-{number}.nii.gz") as unfinished:
            nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), unfinished)


def _suffix(path: Path) -> str:
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix


def _body(volume: np.ndarray) -> tuple[slice, ...]:
    """The box of the largest thing that is no air, in the plane, with a margin; the table is opened away."""
    from scipy import ndimage

    parts, n = ndimage.label(ndimage.binary_opening(volume > BODY_HU, iterations=3))
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, n + 1))
    _, rows, columns = np.where(parts == 1 + int(np.argmax(sizes)))
    return (
        slice(None),
        slice(max(0, rows.min() - MARGIN), rows.max() + 1 + MARGIN),
        slice(max(0, columns.min() - MARGIN), columns.max() + 1 + MARGIN),
    )


def _read(values: np.ndarray, points: np.ndarray, axis: int) -> np.ndarray:
    """Values along an axis at fractional places, linear between neighbours."""
    low = np.floor(points).astype(int)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    shape = [1] * values.ndim
    shape[axis] = -1
    weight = (points - low).reshape(shape)
    return np.take(values, low, axis) * (1 - weight) + np.take(values, high, axis) * weight
