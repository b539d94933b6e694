"""CT as DICOM in: a folder of slices becomes a `Scan`. The way back is in `dicom_out`.

A slice's place is its ImagePositionPatient and nothing else: file names and InstanceNumber are often out of order.
pydicom and nibabel are imported on first use.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .acquisitions import check_one_acquisition, check_one_content
from .dicom_folder import MULTI_FRAME, ct_series, name_of, need
from .dicom_frames import read_frames
from .hounsfield import check_hu
from .nifti import nifti_header
from .scan import Scan, to_working, working_axes

_MOST_PIXELS = 2**26  # of a slice: 8192 x 8192
_MOST_VOXELS = 2**31  # of a series: 8192 slices of 512 x 512, 8 GB as float32


@dataclass(frozen=True, eq=False)
class Series(Scan):
    """A CT series as a scan: `path` is its folder, `header` that of a NIfTI file of the same grid, so that `write_scan`
    and `read_label` work with it.

    Attributes:
        slices: the files along the third axis of `affine` (columns, rows, slices; in mm, NIfTI's RAS).
    """

    slices: tuple[Path, ...] = ()


def read_series(folder: str | os.PathLike[str], series: str | None = None, *, assume_hu: bool = False) -> Scan:
    """Read the CT series in a folder and the folders below it, links followed.

    Every file is accounted for (see `dicom_folder`): what claims to be DICOM must be readable, and what is no CT slice
    is named in a warning. Slices are sorted along their normal, each with its own rescale slope and intercept; a
    tilted gantry keeps its sheared grid. MONOCHROME1 alters the display alone, not the HU. Enhanced multi-frame CT is
    read through highdicom, and is a plain `Scan`.

    Args:
        folder: where the slices are.
        series: SeriesInstanceUID, where the folder holds several.
        assume_hu: whether the look at the values is left out, which refuses what does not look like HU.

    Raises:
        ValueError: in one sentence, when there is no series or more than one, a tag is missing, slices are missing,
            double, of two patients or acquisitions or differ in grid, or pixels cannot be decoded or are not HU.
    """
    folder = Path(os.path.abspath(folder))  # so that "." has a name, too
    headers = _choose(folder, ct_series(folder), series)
    if str(headers[0].get("SOPClassUID")) in MULTI_FRAME:
        return read_frames(folder, headers, assume_hu=assume_hu)
    headers, affine = _sort(headers)
    check_one_acquisition(headers)
    rows, columns = _size(folder, headers)
    stack = np.empty((len(headers), rows, columns), np.float32)
    for k, header in enumerate(headers):
        dataset, stored = read_slice(Path(header.filename))
        stack[k] = slice_hu(dataset, stored)
    check_one_content(headers, stack)
    axes, flipped = working_axes(folder, affine)
    volume_hu = to_working(stack.transpose(2, 1, 0), (1.0, 0.0), axes, flipped)
    check_hu(folder, volume_hu, assume_hu=assume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    files = tuple(Path(header.filename) for header in headers)
    return Series(volume_hu, (dz, dy, dx), folder, nifti_header(stack, affine), affine, axes, flipped, files)


def _size(folder: Path, headers: Sequence[Any]) -> tuple[int, int]:
    """Rows and columns, before anything of that size is allocated."""
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)
    n_pixels = rows * columns
    if not 0 < n_pixels <= _MOST_PIXELS or n_pixels * len(headers) > _MOST_VOXELS:
        raise ValueError(
            f"{folder.name}: expected slices of at most {_MOST_PIXELS:,} pixels and {_MOST_VOXELS:,} voxels in all, "
            f"got {len(headers)} of {rows} x {columns}; export the series again, or split it"
        )
    return rows, columns


def _choose(folder: Path, found: dict[str, list[Any]], series: str | None) -> list[Any]:
    if series is None and len(found) == 1:
        return next(iter(found.values()))
    if series in found:
        return found[series]
    listed = ", ".join(
        f"{uid} ({headers[0].get('SeriesDescription') or 'no description'}, {len(headers)} slices)"
        for uid, headers in found.items()
    )
    got = f"{len(found)} series" if series is None else f"no series {series}"
    raise ValueError(f"{folder.name}: expected one CT series, got {got}; choose one with --series UID out of {listed}")


def _sort(headers: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Put slices in order along their normal; return them and the affine (column, row, slice) to RAS in mm."""
    first = headers[0]
    for header in headers:
        for keyword in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            mine, theirs = _numbers(header, keyword), _numbers(first, keyword)
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
                raise ValueError(
                    f"{name_of(header)}: expected the {keyword} of {name_of(first)}, got another; the series mixes "
                    "grids, so move the slices of each into a folder of their own"
                )
    along_row, along_column = _numbers(first, "ImageOrientationPatient").reshape(2, 3)
    normal = np.cross(along_row, along_column)
    if not np.allclose([np.linalg.norm(along_row), np.linalg.norm(normal)], 1, atol=1e-3):
        raise ValueError(
            f"{name_of(first)}: expected two directions at right angles in ImageOrientationPatient, got "
            f"{list(first.ImageOrientationPatient)}; export the series again"
        )
    positions = np.array([_numbers(header, "ImagePositionPatient") for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    row_mm, column_mm = _lengths_mm(first, "PixelSpacing")  # between rows, then between columns
    if len(headers) == 1:
        step = normal * _lengths_mm(first, "SliceThickness")[0]
    else:
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
        _check_spacing(headers, positions, normal, step, min(row_mm, column_mm))
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * column_mm, along_column * row_mm, step, positions[0]], axis=1)
    affine[:2] *= -1  # DICOM's x and y run to the left and the back, NIfTI's to the right and the front
    return headers, affine


_LENGTHS = {"Rows": 1, "Columns": 1, "PixelSpacing": 2, "ImagePositionPatient": 3, "ImageOrientationPatient": 6}


def _numbers(header: Any, keyword: str) -> np.ndarray:
    """A tag's numbers: as many as it must have, and all of them finite."""
    value = need(header, keyword)
    try:
        numbers = np.atleast_1d(np.asarray(value, float))
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if len(numbers) != _LENGTHS.get(keyword, 1) or not np.isfinite(numbers).all():
        raise ValueError(
            f"{name_of(header)}: expected {_LENGTHS.get(keyword, 1)} finite numbers in the DICOM tag {keyword}, got "
            f"{str(value)[:80]}; export the series again"
        )
    return numbers


def _lengths_mm(header: Any, keyword: str) -> list[float]:
    lengths_mm = [float(mm) for mm in _numbers(header, keyword)]
    if min(lengths_mm) <= 0:
        raise ValueError(
            f"{name_of(header)}: expected positive lengths in mm in the DICOM tag {keyword}, got {lengths_mm}; "
            "export the series again"
        )
    return lengths_mm


def _check_spacing(
    headers: Sequence[Any], at: np.ndarray, normal: np.ndarray, step: np.ndarray, pixel_mm: float
) -> None:
    gaps_mm = np.diff(at @ normal)
    usual_mm = float(np.sort(gaps_mm)[(len(gaps_mm) - 1) // 2])  # the lower median: missing slices only widen gaps
    for a, b, gap_mm in zip(headers, headers[1:], gaps_mm, strict=False):
        if gap_mm < 0.01:
            raise ValueError(
                f"{name_of(b)}: expected one slice per place, got {name_of(a)} at the same place "
                f"{_place(b)}; remove the copy, or give each phase a folder of its own"
            )
        if abs(gap_mm - usual_mm) > 0.1 * usual_mm:
            raise ValueError(
                f"{name_of(b)}: expected {usual_mm:.4g} mm to the slice before it ({name_of(a)}), got {gap_mm:.4g} mm "
                f"at {_place(b)}; find the missing slices, or take the odd ones out"
            )
    off_mm = np.linalg.norm(at - (at[0] + np.arange(len(at))[:, None] * step), axis=1)
    worst = int(off_mm.argmax())
    if off_mm[worst] > 0.5 * pixel_mm:
        raise ValueError(
            f"{name_of(headers[worst])}: expected slices along one straight line at one distance, got one "
            f"{off_mm[worst]:.2g} mm off; the series is not one regular grid"
        )


def read_slice(file: Path) -> tuple[Any, np.ndarray]:
    """A slice's dataset and its stored numbers `(rows, columns)`, 16 bits each."""
    from pydicom import dcmread
    from pydicom.pixels import get_decoder

    again = "export the series again, uncompressed"
    try:
        dataset = dcmread(file, force=True)  # slices without preamble are read, too
        syntax = _syntax(dataset)
        little = syntax.is_little_endian
        layout = [dataset.get(k) for k in ("SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")]
    except Exception as error:
        raise ValueError(f"{file.name}: expected a DICOM slice, got a damaged file; export it again") from error
    if layout not in ([1, 16, "MONOCHROME1"], [1, 16, "MONOCHROME2"]) or "ModalityLUTSequence" in dataset:
        raise ValueError(f"{file.name}: expected 16-bit grey values with a rescale slope, got {layout}; {again}")
    if not little:  # retired in 2006; overlays and private data would come out with bytes swapped
        raise ValueError(f"{file.name}: expected little endian, got {syntax.name}; convert it with dcmconv +te")
    try:
        decodable = not syntax.is_encapsulated or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):  # a transfer syntax that pydicom, or nobody, knows
        decodable = False
    if not decodable:
        raise ValueError(
            f"{file.name}: expected pixels that can be decoded, got {syntax.name} and no decoder for it; "
            "pip install 'pylibjpeg[all]'"
        )
    _check_bits(file, dataset)
    try:
        stored = _stored(dataset)
    except Exception as error:
        raise ValueError(f"{file.name}: expected whole pixel data, got less or damaged; export it again") from error
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ValueError(f"{file.name}: expected one slice per file, got {stored.shape}; {again}")
    return dataset, stored


def _syntax(dataset: Any) -> Any:
    """The transfer syntax; where a file without meta header does not say, how pydicom found it to be encoded."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        plain = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = plain if little else uid.ExplicitVRBigEndian
    return dataset.file_meta.TransferSyntaxUID


def _check_bits(file: Path, dataset: Any) -> None:
    bits, high, sign = (_value(dataset, k) for k in ("BitsStored", "HighBit", "PixelRepresentation"))
    whole = all(isinstance(value, int) for value in (bits, high, sign))
    shifted = whole and high != bits - 1
    encapsulated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if not whole or not 1 <= bits <= high + 1 <= 16 or sign not in (0, 1) or (shifted and encapsulated):
        raise ValueError(
            f"{file.name}: expected up to 16 bits stored below HighBit, got BitsStored {_brief(bits)}, "
            f"HighBit {_brief(high)}, PixelRepresentation {_brief(sign)}; export the series again, uncompressed"
        )


def _value(dataset: Any, name: str) -> Any:
    """A tag's value; where a damaged tag is of a kind that nobody knows, the reason why it has none."""
    try:
        return dataset.get(name)
    except NotImplementedError as error:
        return str(error)


def _brief(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder=" ...")


def _stored(dataset: Any) -> np.ndarray:
    """The stored numbers. pydicom takes them from the lowest bits, whatever HighBit says; they may lie higher."""
    bits, high = int(dataset.BitsStored), int(dataset.HighBit)
    if high == bits - 1:
        stored: np.ndarray = dataset.pixel_array
        return stored
    count = int(dataset.Rows) * int(dataset.Columns)
    raw = np.frombuffer(dataset.PixelData, "<u2", count).reshape(dataset.Rows, dataset.Columns)
    raised = (raw << (15 - high)).astype(np.uint16)  # what lies above HighBit falls out
    return raised.view(np.int16 if dataset.PixelRepresentation else np.uint16) >> (16 - bits)


def rescale(dataset: Any) -> tuple[float, float]:
    slope, intercept = (float(_numbers(dataset, keyword)[0]) for keyword in ("RescaleSlope", "RescaleIntercept"))
    try:
        kind = str(dataset.get("RescaleType") or "HU")
    except Exception:  # bytes that are no text
        kind = "that cannot be read"
    if slope == 0 or kind not in ("HU", "US"):
        raise ValueError(
            f"{name_of(dataset)}: expected a rescale to HU, got slope {slope:g}, intercept {intercept:g}, type {kind}; "
            "give the CT series itself"
        )
    return slope, intercept


def slice_hu(dataset: Any, stored: np.ndarray) -> np.ndarray:
    slope, intercept = rescale(dataset)
    return (stored * slope + intercept).astype(np.float32)


def _place(header: Any) -> str:
    return "({:g}, {:g}, {:g}) mm".format(*header.ImagePositionPatient)
