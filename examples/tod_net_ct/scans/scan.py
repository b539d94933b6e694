"""A CT volume in the working orientation, whatever file it came from.

Slices run towards the head, rows towards the back, columns towards the patient's left (DICOM's LPS), so that
`imshow(volume_hu[z])` shows a slice as a radiologist sees it. nibabel is imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        per_unit = np.diag([mm_per_unit(self.header)] * 3 + [1.0])
        return per_unit @ _grid_affine(self.affine, self.axes, self.flipped, tuple(self.volume_hu.shape))


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
    values = np.flip(raw.transpose(axes), tuple(k for k in range(3) if flipped[k]))
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
    off_mm = float(np.linalg.norm(corners @ apart.T, axis=1).max()) * mm_per_unit(like.header)
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


def mm_per_unit(header: Any) -> float:
    """What a length in the file is in mm; DICOM knows mm alone."""
    return _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0) if hasattr(header, "get_xyzt_units") else 1.0


def check_like(path: Path, volume_hu: Tensor, like: Scan) -> None:
    """Refuse to write what is not a volume of the scan's shape with finite HU."""
    if volume_hu.shape != like.volume_hu.shape:
        raise ValueError(
            f"{path.name}: expected a volume of {sides(like.volume_hu.shape)}, got {sides(volume_hu.shape)}; "
            "give the scan's own shape (slice, row, column)"
        )
    if not bool(torch.isfinite(volume_hu).all()):
        raise ValueError(f"{path.name}: expected finite HU to write, got NaN or infinity; check the denoiser")


def sides(shape: Any) -> str:
    return "x".join(str(n) for n in shape)
