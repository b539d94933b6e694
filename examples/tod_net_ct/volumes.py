"""Real CT in and out: NIfTI files become `(slice, row, column)` tensors in HU, and go back as they came.

Working orientation: slices run towards the head, rows towards the back, columns towards the patient's left (DICOM's
LPS), so that `imshow(volume_hu[z])` shows a slice as a radiologist sees it. nibabel is imported on first use.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WINDOW_HU = (-200.0, 200.0)
_MM_PER_UNIT = {"unknown": 1.0, "meter": 1000.0, "mm": 1.0, "micron": 0.001}


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT volume in the working orientation, with what is needed to write its like.

    Attributes:
        volume_hu: `(D, H, W)` float32 in HU; slice towards the head, row towards the back, column towards the left.
        voxel_mm: `(dz, dy, dx)` in mm, from the affine's columns.
        path: the file that was read.
        header: the nibabel header as read, with the file's own scaling (`scl_slope`, `scl_inter`) put back.
        affine: `(4, 4)`, file voxel to scanner position, in the file's unit (mm unless its header says otherwise).
        axes: the file's axis behind z, y and x.
        flipped: whether z, y and x run against that file axis.
    """

    volume_hu: Tensor
    voxel_mm: tuple[float, float, float]
    path: Path
    header: Any
    affine: np.ndarray
    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    @property
    def grid_affine(self) -> np.ndarray:
        """`(4, 4)`: from (slice, row, column) of `volume_hu` to the scanner's position in mm."""
        per_unit = np.diag([_mm_per_unit(self.header)] * 3 + [1.0])
        return per_unit @ _grid_affine(self.affine, self.axes, self.flipped, tuple(self.volume_hu.shape))


def to_unit(volume_hu: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Clamp HU to a window and scale it to [0, 1] (the paper's section 3.3).

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return (volume_hu - lower).div_(upper - lower).clamp_(0, 1)  # one new volume, not three


def to_hu(unit: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Scale [0, 1] back to HU; the inverse of `to_unit` inside the window, and no clamp.

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return unit * (upper - lower) + lower


def read_scan(path: str | os.PathLike[str]) -> Scan:
    """Read a CT volume from NIfTI (`.nii`, `.nii.gz`; either byte order, NIfTI-1 or -2) in any orientation, or a DICOM
    series from the folder that holds it.

    An oblique volume keeps its grid: axes are permuted and flipped to the nearest working direction, never resampled.
    float64 files are read as float32.

    Raises:
        ValueError: the file is missing, damaged or no NIfTI, is not 3-D (trailing axes of length 1 are accepted),
            has a singular affine or voxels that are not finite, or holds values that are not HU.
    """
    path = Path(path)
    if path.is_dir():
        from .dicom import read_series

        return read_series(path)
    raw, header, affine, scaling = _read_nifti(path)
    axes, flipped = working_axes(path, affine)
    volume_hu = to_working(raw, scaling, axes, flipped)
    check_hu(path, volume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0) * _mm_per_unit(header)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    header.set_slope_inter(*scaling)  # nibabel blanks these on reading
    return Scan(volume_hu, (dz, dy, dx), path, header, affine, axes, flipped)


def read_low_dose(path: str | os.PathLike[str], like: Scan) -> Scan:
    """Read the low-dose partner of a scan, which has the same voxels.

    Raises:
        ValueError: as `read_scan`, or the two differ in shape or lie elsewhere in space.
    """
    low = read_scan(path)
    if low.volume_hu.shape != like.volume_hu.shape:
        raise ValueError(
            f"{like.path.name}: the low dose is {_by(low.volume_hu.shape)} but the scan is {_by(like.volume_hu.shape)} "
            "(slices, rows, columns); check the pair"
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
    raw, _, affine, scaling = _read_nifti(path)
    axes, flipped = working_axes(path, affine)
    values = to_working(raw, scaling, axes, flipped)
    if values.shape != like.volume_hu.shape:
        scan_shape = [like.volume_hu.shape[like.axes.index(axis)] for axis in range(3)]  # in the file's order
        raise ValueError(
            f"{like.path.name}: labels are {_by(raw.shape[:3])} but the scan is {_by(scan_shape)}; check the pair"
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
    values = np.flip(values, [k for k in range(3) if like.flipped[k]]).transpose(np.argsort(like.axes))
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        OSError: in one sentence where the disk is full, whatever the library that wrote made of it.
    """
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex[:12]}-{path.name}")  # keeps the suffix: it picks gzip
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException as error:  # Ctrl-C counts
        unfinished.unlink(missing_ok=True)
        if _is_full_disk(error):
            sentence = f"{path}: expected room on the disk, got a full one; free some space and start again"
            raise OSError(errno.ENOSPC, sentence) from error
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether this failure began with a full disk: torch.save reports one as a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read_nifti(path: Path) -> tuple[np.ndarray, Any, np.ndarray, tuple[float, float]]:
    """Return the stored numbers (file order, three axes), the header, the affine and (slope, intercept)."""
    import nibabel as nib

    if not path.is_file():
        raise ValueError(f"{path.name}: expected a NIfTI file, got none at {path}; check the path")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)  # whole, because only the end of the stream proves its checksum
        if content[344:348] == b"n+1\0":
            image_class: Any = nib.Nifti1Image
        elif content[4:8] == b"n+2\0":
            image_class = nib.Nifti2Image
        else:
            raise ValueError(
                f"{path.name}: expected a NIfTI file, got another format; convert it, for example with dcm2niix"
            )
        try:
            image = image_class.from_bytes(content)
            affine = np.asarray(image.affine, dtype=np.float64)
            raw = np.asarray(image.dataobj.get_unscaled())
        except (ValueError, TypeError, KeyError) as error:
            raise OSError(error) from error
    except (OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split()).rstrip(".;") or type(error).__name__
        raise ValueError(
            f"{path.name}: expected a whole NIfTI file, got a truncated or damaged one ({reason}); copy it again"
        ) from error
    if raw.dtype.kind not in "iuf":
        raise ValueError(f"{path.name}: expected one number per voxel, got {raw.dtype}; give a scalar image")
    if raw.ndim < 3 or raw.size == 0 or math.prod(raw.shape[3:]) != 1:
        raise ValueError(
            f"{path.name}: expected three axes of voxels, got {_by(raw.shape)}; "
            "split a series into single volumes, and stack slices into one"
        )
    scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    return raw.reshape(raw.shape[:3]), image.header, affine, scaling


def working_axes(path: Path, affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return the file axis behind z, y and x, and whether each is flipped."""
    import nibabel as nib

    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    # The volume of the voxel over that of a box with its edges: 1 for square corners, 0.9 for a tilted gantry.
    if not np.isfinite(affine).all() or not lengths.min() > 0 or abs(np.linalg.det(columns / lengths)) < 1e-3:
        raise ValueError(
            f"{path.name}: expected an affine with three independent axes, got a singular one; repair the header's "
            "sform or qform"
        )
    orientation = nib.orientations.io_orientation(affine)
    file_axis = {int(world): axis for axis, (world, _) in enumerate(orientation)}
    axes = (file_axis[2], file_axis[1], file_axis[0])
    towards = [orientation[axis, 1] for axis in axes]  # +1: towards the head, the front, the right
    return axes, (bool(towards[0] < 0), bool(towards[1] > 0), bool(towards[2] > 0))


def to_working(
    raw: np.ndarray, scaling: tuple[float, float], axes: tuple[int, int, int], flipped: tuple[bool, bool, bool]
) -> Tensor:
    values = np.flip(raw.transpose(axes), [k for k in range(3) if flipped[k]])
    if scaling != (1.0, 0.0):
        values = values.astype(np.float64) * scaling[0] + scaling[1]
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which the caller refuses by name
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def check_place(
    path: Path, what: str, affine: np.ndarray, axes: tuple[int, ...], flipped: tuple[bool, ...], like: Scan
) -> None:
    """Refuse a grid whose corners lie more than half a voxel away from the scan's."""
    shape = tuple(like.volume_hu.shape)
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], [1], indexing="ij"), -1).reshape(8, 4)
    apart = _grid_affine(affine, axes, flipped, shape) - _grid_affine(like.affine, like.axes, like.flipped, shape)
    off_mm = float(np.linalg.norm(corners @ apart.T, axis=1).max()) * _mm_per_unit(like.header)
    if not off_mm <= 0.5 * min(like.voxel_mm):
        raise ValueError(
            f"{path.name}: expected {what} on the grid of {like.path.name}, got a grid that lies up to {off_mm:.1f} mm "
            "away; check the pair, or copy the scan's affine if only the header is wrong"
        )


def _grid_affine(
    affine: np.ndarray, axes: tuple[int, ...], flipped: tuple[bool, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """From (slice, row, column) in the working orientation to the file's positions."""
    to_file = np.zeros((4, 4))
    to_file[3, 3] = 1
    for k in range(3):
        to_file[axes[k], k] = -1 if flipped[k] else 1
        to_file[axes[k], 3] = shape[k] - 1 if flipped[k] else 0
    return np.asarray(affine @ to_file)


def _mm_per_unit(header: Any) -> float:
    """What a length in the file is in mm; DICOM knows mm alone."""
    return _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0) if hasattr(header, "get_xyzt_units") else 1.0


def check_like(path: Path, volume_hu: Tensor, like: Scan) -> None:
    """Refuse to write what is not a volume of the scan's shape with finite HU."""
    if volume_hu.shape != like.volume_hu.shape:
        raise ValueError(
            f"{path.name}: expected a volume of {_by(like.volume_hu.shape)}, got {_by(volume_hu.shape)}; "
            "give the scan's own shape (slice, row, column)"
        )
    if not bool(torch.isfinite(volume_hu).all()):
        raise ValueError(f"{path.name}: expected finite HU to write, got NaN or infinity; check the denoiser")


def check_hu(path: Path, volume_hu: Tensor) -> None:
    bad = int((~torch.isfinite(volume_hu)).sum())
    if bad:
        raise ValueError(
            f"{path.name}: expected a finite HU in every voxel, got {bad} NaN or infinite; "
            "replace them, for example by -1024 outside the field of view"
        )
    low, high = float(volume_hu.min()), float(volume_hu.max())
    if low >= -1 and high <= 1:
        raise ValueError(
            f"{path.name}: expected HU (air near -1000), got values from {low:g} to {high:g}, a scaled image; "
            "convert it back to HU"
        )
    if low >= 0 and high > 2000:
        raise ValueError(
            f"{path.name}: expected HU (air near -1000), got values from {low:g} to {high:g}, which look like unsigned "
            "CT numbers; subtract 1024"
        )
    if low == 0 and high == 255:
        raise ValueError(f"{path.name}: expected HU (air near -1000), got 8-bit grey levels; convert it back to HU")


def _bounds(window_hu: tuple[float, float]) -> tuple[float, float]:
    lower, upper = window_hu
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise ValueError(f"window_hu: expected (lower, upper) in HU, got {window_hu}; for example (-200, 200)")
    return lower, upper


def _by(shape: Any) -> str:
    return "x".join(str(n) for n in shape)
