"""Enhanced multi-frame CT: one file with all slices, read through highdicom, which knows its functional groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_folder import name_of
from .hounsfield import check_hu
from .nifti import nifti_header
from .scan import Scan, to_working, working_axes

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's x and y run to the left and the back


def read_frames(folder: Path, headers: Sequence[Any], *, assume_hu: bool = False) -> Scan:
    """Read one multi-frame file as a scan on the grid that its functional groups tell, with each frame's own rescale.

    Raises:
        ValueError: highdicom is not installed, there are several files, or the frames make no regular volume in HU.
    """
    names = [name_of(header) for header in headers]
    if len(headers) > 1:
        raise ValueError(
            f"{folder.name}: expected one multi-frame file in a series, got {', '.join(names[:5])}; "
            "give each a folder of its own"
        )
    file = Path(headers[0].filename)
    try:
        import highdicom
    except ImportError as error:
        raise ValueError(f"{file.name}: enhanced multi-frame CT needs highdicom; pip install 'taskloss[ct]'") from error
    try:
        volume = highdicom.imread(file).get_volume(dtype=np.float32, apply_modality_transform=True)
    except Exception as error:  # highdicom's and pydicom's are of many kinds
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{file.name}: expected frames that make one regular volume in HU, got others ({reason}); "
            "export the series as single slices"
        ) from error
    stack = np.asarray(volume.array)  # slices, rows, columns
    affine = _RAS @ volume.affine[:, [2, 1, 0, 3]]  # columns, rows, slices, as in a classic series
    axes, flipped = working_axes(file, affine)
    volume_hu = to_working(stack.transpose(2, 1, 0), (1.0, 0.0), axes, flipped)
    check_hu(file, volume_hu, assume_hu=assume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    return Scan(volume_hu, (dz, dy, dx), folder, nifti_header(stack, affine), affine, axes, flipped)
