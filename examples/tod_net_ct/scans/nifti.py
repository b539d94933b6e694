"""NIfTI in and out: files become a `Scan`, and go back as they came. nibabel is imported on first use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..run import replacing
from .hounsfield import check_hu
from .nifti_stored import read_stored
from .scan import Scan, check_like, mm_per_unit, to_working, working_axes


def read_nifti(path: str | os.PathLike[str], *, assume_hu: bool = False) -> Scan:
    """Read a CT volume from NIfTI (`.nii`, `.nii.gz`; either byte order, NIfTI-1 or -2) in any orientation.

    An oblique volume keeps its grid: axes are permuted and flipped to the nearest working direction, never resampled.
    float64 files are read as float32.

    Args:
        path: the file.
        assume_hu: whether the look at the values is left out, which refuses what does not look like HU.

    Raises:
        ValueError: the file is missing, damaged or no NIfTI, is not 3-D (trailing axes of length 1 are accepted),
            has a singular affine or voxels that are not finite, or holds values that are not HU.
    """
    path = Path(path)
    raw, header, affine, scaling = read_stored(path)
    axes, flipped = working_axes(path, affine)
    volume_hu = to_working(raw, scaling, axes, flipped)
    check_hu(path, volume_hu, assume_hu=assume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0) * mm_per_unit(header)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    header.set_slope_inter(*scaling)  # nibabel blanks these on reading
    return Scan(volume_hu, (dz, dy, dx), path, header, affine, axes, flipped)


def write_scan(path: str | os.PathLike[str], volume_hu: Tensor, like: Scan) -> Path:
    """Write a volume as the scan was stored: same dtype, shape, affine, sform and qform, units, orientation, scaling.

    Integer files are rounded to the nearest stored number and clipped to the dtype's range. The file appears whole
    under its name, or not at all.

    Args:
        path: `.nii` or `.nii.gz`; an existing file is replaced.
        volume_hu: `(D, H, W)` in HU, in the working orientation.
        like: the scan whose geometry and storage the file takes.

    Raises:
        ValueError: the suffix or the shape is wrong, or a voxel is not finite.
    """
    import nibabel as nib
    from nibabel.casting import float_to_int

    path = check_nifti_name(path)
    check_like(path, volume_hu, like)
    values = volume_hu.detach().cpu().numpy()
    values = np.flip(values, tuple(k for k in range(3) if like.flipped[k])).transpose(np.argsort(like.axes))
    header = like.header.copy()
    slope, inter = header.get_slope_inter()
    dtype = header.get_data_dtype()
    if (slope, inter) != (1.0, 0.0):
        values = (values.astype(np.float64) - inter) / slope
    raw = float_to_int(values, dtype.newbyteorder("=")) if dtype.kind in "iu" else values
    image_class = nib.Nifti2Image if int(header["sizeof_hdr"]) == 540 else nib.Nifti1Image
    image = image_class(raw.astype(dtype).reshape(header.get_data_shape()), like.affine, header)
    image.header.set_slope_inter(slope, inter)  # an image forgets its header's scaling, too
    with replacing(path) as unfinished:
        image.to_filename(unfinished)
    return path


def check_nifti_name(path: str | os.PathLike[str]) -> Path:
    """Return the path of a NIfTI file to be written.

    Raises:
        ValueError: the name does not end in `.nii` or `.nii.gz`, or the folder is missing.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path.name}: expected a name in .nii or .nii.gz, got neither; change the output's name")
    if not path.parent.is_dir():
        raise ValueError(f"{path.name}: expected the folder {path.parent} to exist, got none; make it first")
    return path


def nifti_header(stack: np.ndarray, affine: np.ndarray) -> Any:
    """The header of a NIfTI file that holds slices `(n, rows, columns)` in HU: int16 where that loses nothing."""
    import nibabel as nib

    header = nib.Nifti1Header()
    whole = all(np.array_equal(hu, np.rint(hu)) and abs(hu).max() <= 32767 for hu in stack)
    header.set_data_dtype(np.int16 if whole else np.float32)
    header.set_data_shape(stack.shape[::-1])
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    if not np.allclose(header.get_qform(), affine, atol=1e-3):  # it has no room for a tilted gantry's shear
        header.set_qform(None, code=0)
    return header
