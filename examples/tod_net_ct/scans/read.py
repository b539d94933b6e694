"""Any scan by its path, and what belongs to it: the low dose and the label on the same grid."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from .dicom import read_series
from .nifti import read_nifti
from .nifti_stored import read_stored
from .scan import Scan, check_place, sides, to_working, working_axes


def read_scan(path: str | os.PathLike[str], *, assume_hu: bool = False) -> Scan:
    """Read a CT volume from NIfTI (`read_nifti`), or a DICOM series from the folder that holds it (`read_series`)."""
    path = Path(path)
    return read_series(path, assume_hu=assume_hu) if path.is_dir() else read_nifti(path, assume_hu=assume_hu)


def read_low_dose(path: str | os.PathLike[str], like: Scan, *, assume_hu: bool = False) -> Scan:
    """Read the low-dose partner of a scan, which has the same voxels.

    Raises:
        ValueError: as `read_scan`, or the two differ in shape or lie elsewhere in space.
    """
    low = read_scan(path, assume_hu=assume_hu)
    if low.volume_hu.shape != like.volume_hu.shape:
        raise ValueError(
            f"{like.path.name}: the low dose is {sides(low.volume_hu.shape)} but the scan is "
            f"{sides(like.volume_hu.shape)} (slices, rows, columns); check the pair"
        )
    check_place(low.path, "a low dose", low.affine, low.axes, low.flipped, like)
    return low


def read_label(path: str | os.PathLike[str], like: Scan, *, allow_empty: bool = False) -> Tensor:
    """Read the segmentation drawn on a scan, in the same working orientation.

    Returns:
        `(D, H, W)` uint8 class numbers; at least one voxel is not 0, unless `allow_empty`.

    Raises:
        ValueError: the file is missing or damaged, differs from the scan in shape or lies elsewhere in space, holds
            anything but whole numbers in 0..255, or is empty.
    """
    path = Path(path)
    raw, _, affine, scaling = read_stored(path)
    axes, flipped = working_axes(path, affine)
    values = to_working(raw, scaling, axes, flipped)
    if values.shape != like.volume_hu.shape:
        scan_shape = [like.volume_hu.shape[like.axes.index(axis)] for axis in range(3)]  # in the file's order
        raise ValueError(
            f"{like.path.name}: labels are {sides(raw.shape[:3])} but the scan is {sides(scan_shape)}; check the pair"
        )
    check_place(path, "labels", affine, axes, flipped, like)
    if not bool(((values >= 0) & (values <= 255) & (values == values.round())).all()):
        raise ValueError(
            f"{path.name}: expected whole class numbers in 0..255, got {values.min():g} to {values.max():g} with "
            "other values; give the segmentation, not an image"
        )
    if not allow_empty and not bool(values.any()):
        raise ValueError(f"{path.name}: expected a labelled voxel, got an empty mask; leave this case out")
    return values.to(torch.uint8)
