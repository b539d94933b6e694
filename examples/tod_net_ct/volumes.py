"""Real CT in and out: NIfTI files become `(slice, row, column)` tensors in HU, and go back as they came.

Working orientation: slices run towards the head, rows towards the back, columns towards the patient's left (DICOM's
LPS), so that `imshow(volume_hu[z])` shows a slice as a radiologist sees it. nibabel is imported on first use.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """A scan and the label that belongs to it."""

    scan: Path
    label: Path

    @property
    def name(self) -> str:
        """`volume-12` in LiTS's layout, `case_00012` in KiTS's."""
        return self.scan.parent.name if self.scan.name.startswith("imaging") else self.scan.name.split(".")[0]


def to_unit(volume_hu: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Clamp HU to a window and scale it to [0, 1] (the paper's section 3.3).

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return ((volume_hu - lower) / (upper - lower)).clamp(0, 1)


def to_hu(unit: Tensor, window_hu: tuple[float, float] = WINDOW_HU) -> Tensor:
    """Scale [0, 1] back to HU; the inverse of `to_unit` inside the window, and no clamp.

    Raises:
        ValueError: the window is not a pair of finite numbers, lower first.
    """
    lower, upper = _bounds(window_hu)
    return unit * (upper - lower) + lower


def read_scan(path: str | os.PathLike[str]) -> Scan:
    """Read a CT volume from NIfTI (`.nii`, `.nii.gz`; either byte order, NIfTI-1 or -2) in any orientation.

    An oblique volume keeps its grid: axes are permuted and flipped to the nearest working direction, never resampled.
    float64 files are read as float32.

    Raises:
        ValueError: the file is missing, damaged or no NIfTI, is not 3-D (trailing axes of length 1 are accepted),
            has a singular affine or voxels that are not finite, or holds values that are not HU.
    """
    path = Path(path)
    raw, header, affine, scaling = _read_nifti(path)
    axes, flipped = _working_axes(path, affine)
    volume_hu = _to_working(raw, scaling, axes, flipped)
    _check_hu(path, volume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0) * _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    header.set_slope_inter(*scaling)  # nibabel blanks these on reading
    return Scan(volume_hu, (dz, dy, dx), path, header, affine, axes, flipped)


def read_label(path: str | os.PathLike[str], like: Scan) -> Tensor:
    """Read the segmentation drawn on a scan, in the same working orientation.

    Returns:
        `(D, H, W)` uint8 class numbers; at least one voxel is not 0.

    Raises:
        ValueError: the file is missing or damaged, differs from the scan in shape or lies elsewhere in space, holds
            anything but whole numbers in 0..255, or is empty.
    """
    path = Path(path)
    raw, _, affine, scaling = _read_nifti(path)
    axes, flipped = _working_axes(path, affine)
    values = _to_working(raw, scaling, axes, flipped)
    if values.shape != like.volume_hu.shape:
        scan_shape = [like.volume_hu.shape[like.axes.index(axis)] for axis in range(3)]  # in the file's order
        raise ValueError(
            f"{like.path.name}: labels are {_by(raw.shape[:3])} but the scan is {_by(scan_shape)}; check the pair"
        )
    off_mm = _offset(affine, axes, flipped, like)
    if not off_mm <= 0.5 * min(like.voxel_mm):
        raise ValueError(
            f"{path.name}: expected labels on the grid of {like.path.name}, got a grid that lies up to {off_mm:.1f} mm "
            "away; check the pair, or copy the scan's affine if only the header is wrong"
        )
    if not bool(((values >= 0) & (values <= 255) & (values == values.round())).all()):
        raise ValueError(
            f"{path.name}: expected whole class numbers in 0..255, got {values.min():g} to {values.max():g} with "
            "other values; give the segmentation, not an image"
        )
    if not bool(values.any()):
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
    if volume_hu.shape != like.volume_hu.shape:
        raise ValueError(
            f"{path.name}: expected a volume of {_by(like.volume_hu.shape)}, got {_by(volume_hu.shape)}; "
            "give the scan's own shape (slice, row, column)"
        )
    if not bool(torch.isfinite(volume_hu).all()):
        raise ValueError(f"{path.name}: expected finite HU to write, got NaN or infinity; check the denoiser")
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


def find_cases(folder: str | os.PathLike[str]) -> list[Case]:
    """Pair scans with labels in LiTS's layout (`volume-N.nii[.gz]`, `segmentation-N.nii[.gz]`) or KiTS's
    (`case_NNNNN/imaging.nii.gz`, `segmentation.nii.gz`), in the order of their numbers.

    Raises:
        ValueError: the folder is missing or holds neither layout, a partner is missing, or one case has two files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder.name}: expected a folder of cases, got no such folder at {folder}; check the path")
    found: dict[tuple[str, int, str], Path] = {}  # (layout, case number, role) -> file
    for pattern, layout, roles in (
        ("*.nii*", r"(volume|segmentation)-(\d+)\.nii(\.gz)?", ("volume", "segmentation")),
        ("case_*/*.nii*", r"case_(\d+)/(imaging|segmentation)\.nii(\.gz)?", ("imaging", "segmentation")),
    ):
        for file in sorted(folder.glob(pattern)):
            match = re.fullmatch(layout, file.relative_to(folder).as_posix())
            if match is None:
                continue
            number, role = sorted(match.groups()[:2], key=str.isalpha)  # the digits come first
            key = (roles[0], int(number), "scan" if role == roles[0] else "label")
            if key in found:
                raise ValueError(f"{file.name}: expected one file per case, got {found[key].name} too; remove one")
            found[key] = file
    for (first, number, role), file in found.items():
        if (first, number, "label" if role == "scan" else "scan") not in found:
            other = "segmentation" if role == "scan" else first
            wanted = file.relative_to(folder).as_posix().replace("segmentation" if role == "label" else first, other)
            raise ValueError(
                f"{wanted}: expected the partner of {file.relative_to(folder).as_posix()}, got no such file; "
                "add it, or take the case out of the folder"
            )
    if not found:
        raise ValueError(
            f"{folder.name}: expected volume-N.nii or case_NNNNN/imaging.nii.gz, got neither; give the folder that "
            "holds the cases themselves"
        )
    keys = sorted((first, number) for first, number, role in found if role == "scan")
    return [Case(found[first, number, "scan"], found[first, number, "label"]) for first, number in keys]


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
    """Lend a temporary name beside `path`; rename it to `path` on success, remove it on any failure."""
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex[:12]}-{path.name}")  # keeps the suffix: it picks gzip
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:  # Ctrl-C counts
        unfinished.unlink(missing_ok=True)
        raise


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


def _working_axes(path: Path, affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
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


def _to_working(
    raw: np.ndarray, scaling: tuple[float, float], axes: tuple[int, int, int], flipped: tuple[bool, bool, bool]
) -> Tensor:
    values = np.flip(raw.transpose(axes), [k for k in range(3) if flipped[k]])
    if scaling != (1.0, 0.0):
        values = values.astype(np.float64) * scaling[0] + scaling[1]
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which the caller refuses by name
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _offset(affine: np.ndarray, axes: tuple[int, ...], flipped: tuple[bool, ...], like: Scan) -> float:
    """Return the largest distance, in mm, between a corner of this grid and the same corner of the scan's."""
    shape = like.volume_hu.shape
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in shape], indexing="ij"), -1).reshape(8, 3)
    positions = []
    for matrix, order, flips in ((affine, axes, flipped), (like.affine, like.axes, like.flipped)):
        voxels = np.empty((8, 3))
        for k in range(3):
            voxels[:, order[k]] = shape[k] - 1 - corners[:, k] if flips[k] else corners[:, k]
        positions.append(voxels @ matrix[:3, :3].T + matrix[:3, 3])
    per_unit = _MM_PER_UNIT.get(like.header.get_xyzt_units()[0], 1.0)
    return float(np.linalg.norm(positions[0] - positions[1], axis=1).max()) * per_unit


def _check_hu(path: Path, volume_hu: Tensor) -> None:
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
