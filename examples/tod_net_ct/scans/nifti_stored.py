"""The stored numbers of a NIfTI file, with what its header promises compared to what the file holds first."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .scan import sides

_MOST_VOXELS = 2**31  # 8192 slices of 512 x 512, 8 GB as float32
_DEFLATE_RATIO = 1032  # RFC 1951: no stream unpacks to more than this many times its size
_BEHIND = 2**24  # bytes that may follow the voxels; more is no padding


def read_stored(path: Path) -> tuple[np.ndarray, Any, np.ndarray, tuple[float, float]]:
    """Return the stored numbers (file order, three axes), the header, the affine and (slope, intercept).

    Nothing of the size that a header promises is allocated before the file is known to hold as much.

    Raises:
        ValueError: the file is missing, damaged or no NIfTI, its header is no valid one or promises more than the file
            holds, or it is not one volume of one number per voxel.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    if not path.is_file():
        raise ValueError(f"{path.name}: expected a NIfTI file, got none at {path}; check the path")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as stream:
            start = stream.read(544)
            header = _parse(path, start)
            n_bytes = _check_size(path, header, path.stat().st_size, packed)
            content = _read(path, stream, start, n_bytes)
        image_class = nib.Nifti2Image if len(header.binaryblock) == 540 else nib.Nifti1Image
        try:
            image = image_class.from_bytes(content)
            affine = np.asarray(image.affine, dtype=np.float64)
            raw = np.asarray(image.dataobj.get_unscaled())
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise OSError(error) from error
    except (OSError, EOFError, zlib.error, ImageFileError) as error:
        reason = " ".join(str(error).split()).rstrip(".;") or type(error).__name__
        raise ValueError(
            f"{path.name}: expected a whole NIfTI file, got a truncated or damaged one ({reason}); copy it again"
        ) from error
    if math.prod(raw.shape[3:]) != 1 or raw.ndim < 3 or raw.size == 0:
        raise ValueError(
            f"{path.name}: expected three axes of voxels, got {sides(raw.shape)}; "
            "split a series into single volumes, and stack slices into one"
        )
    scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    return raw.reshape(raw.shape[:3]), image.header, affine, scaling


def _parse(path: Path, start: bytes) -> Any:
    """The header, each field of which is one that can be used."""
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError

    if start[344:348] == b"n+1\0" and len(start) >= 348:
        kind: Any = nib.Nifti1Header
        size = 348
    elif start[4:8] == b"n+2\0" and len(start) >= 540:
        kind, size = nib.Nifti2Header, 540
    else:
        raise ValueError(
            f"{path.name}: expected a NIfTI file, got another format; convert it, for example with dcm2niix"
        )
    header = kind.from_fileobj(io.BytesIO(start[:size]), check=False)
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        _refuse(path, "a known data type", f"datatype code {int(header['datatype'])}")
    if dtype.kind not in "iuf":
        raise ValueError(f"{path.name}: expected one number per voxel, got {dtype}; give a scalar image")
    n_axes, dims = int(header["dim"][0]), [int(n) for n in header["dim"][1:]]
    if not 1 <= n_axes <= 7 or min(dims[:n_axes]) < 1:
        _refuse(path, "1 to 7 axes of at least one voxel", f"dim {[n_axes, *dims]}")
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and offset == int(offset) and offset >= size + 4):
        _refuse(path, f"voxels from byte {size + 4} on", f"vox_offset {offset:g}")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = slope != 0 and not math.isnan(slope)  # NaN and 0 both say: not scaled
    if scaled and not (math.isfinite(slope) and math.isfinite(inter)):
        _refuse(path, "a finite scaling", f"scl_slope {slope:g} and scl_inter {inter:g}")
    if int(header["xyzt_units"]) & 7 > 3:
        _refuse(path, "lengths in metres, mm or micrometres", f"xyzt_units {int(header['xyzt_units'])}")
    return header


def _check_size(path: Path, header: Any, held: int, packed: bool) -> int:
    """Where the voxels end, in bytes; refused where the file cannot hold as much, or nobody's scan is that large."""
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    n_voxels = math.prod(shape)
    if n_voxels > _MOST_VOXELS:
        raise ValueError(
            f"{path.name}: expected at most {_MOST_VOXELS:,} voxels, got a header with {sides(shape)}; check it, or "
            "crop the scan"
        )
    n_bytes = int(header["vox_offset"]) + n_voxels * header.get_data_dtype().itemsize
    if n_bytes > (held * _DEFLATE_RATIO if packed else held):
        raise ValueError(
            f"{path.name}: expected a whole NIfTI file, got a truncated or damaged one (its header promises "
            f"{n_bytes:,} bytes and it has {held:,}); copy it again"
        )
    return n_bytes


def _read(path: Path, stream: BinaryIO | gzip.GzipFile, start: bytes, n_bytes: int) -> bytes:
    """The file up to its voxels' end; read on to its own end, because only that proves a gzip's checksum."""
    content = bytearray(start)
    while len(content) < n_bytes and (chunk := stream.read(min(2**24, n_bytes - len(content)))):
        content += chunk
    if len(content) < n_bytes:
        raise EOFError(f"its header promises {n_bytes:,} bytes and it has {len(content):,}")
    behind = len(content) - n_bytes
    while chunk := stream.read(2**20):
        behind += len(chunk)
        if behind > _BEHIND:
            raise ValueError(
                f"{path.name}: expected little or nothing behind the voxels, got more than {_BEHIND:,} bytes; write "
                "the file again"
            )
    return bytes(content)


def _refuse(path: Path, expected: str, got: str) -> None:
    raise ValueError(f"{path.name}: expected a NIfTI header with {expected}, got {got}; write the file again")
