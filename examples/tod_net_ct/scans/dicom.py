"""CT as DICOM in: a folder of slices becomes a `Scan`. The way back is in `dicom_out`.

A slice's place is its ImagePositionPatient and nothing else: file names and InstanceNumber are often out of order.
pydicom and nibabel are imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .scan import Scan, check_hu, to_working, working_axes

_CT = "1.2.840.10008.5.1.4.1.1.2"
_MULTI_FRAME = (f"{_CT}.1", f"{_CT}.2")
_HEADER = [
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "ImageType", "Rows", "Columns", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"),
]


@dataclass(frozen=True, eq=False)
class Series(Scan):
    """A CT series as a scan: `path` is its folder, `header` that of a NIfTI file of the same grid, so that `write_scan`
    and `read_label` work with it.

    Attributes:
        slices: the files along the third axis of `affine` (columns, rows, slices; in mm, NIfTI's RAS).
    """

    slices: tuple[Path, ...] = ()


def read_series(folder: str | os.PathLike[str], series: str | None = None) -> Series:
    """Read the CT series in a folder and the folders below it; localizers and files that are not CT are passed over.

    Slices are sorted along their normal, each with its own rescale slope and intercept; a tilted gantry keeps its
    sheared grid. MONOCHROME1 alters the display alone, not the HU.

    Args:
        folder: where the slices are.
        series: SeriesInstanceUID, where the folder holds several.

    Raises:
        ValueError: in one sentence, when there is no series or more than one, a tag is missing, slices are missing,
            double or differ in grid, or pixels cannot be decoded or are not HU.
    """
    folder = Path(os.path.abspath(folder))  # so that "." has a name, too
    headers = _choose(folder, _ct_series(folder), series)
    headers, affine = _sort(headers)
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)
    stack = np.empty((len(headers), rows, columns), np.float32)
    for k, header in enumerate(headers):
        dataset, stored = read_slice(Path(header.filename))
        stack[k] = slice_hu(dataset, stored)
    axes, flipped = working_axes(folder, affine)
    volume_hu = to_working(stack.transpose(2, 1, 0), (1.0, 0.0), axes, flipped)
    check_hu(folder, volume_hu)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    dz, dy, dx = (float(lengths[axis]) for axis in axes)
    files = tuple(Path(header.filename) for header in headers)
    return Series(volume_hu, (dz, dy, dx), folder, _nifti_header(stack, affine), affine, axes, flipped, files)


def _ct_series(folder: Path) -> dict[str, list[Any]]:
    """The headers of all CT slices below a folder, by SeriesInstanceUID."""
    from pydicom import dcmread
    from pydicom.misc import is_dicom

    if not folder.is_dir():
        raise ValueError(f"{folder.name}: expected a folder of DICOM files, got none at {folder}; check the path")
    found: dict[str, list[Any]] = {}
    others = set()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name.startswith(".") or not is_dicom(file):
            continue
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=_HEADER)
        except Exception as error:  # what pydicom raises on damage is of many kinds
            raise ValueError(f"{file.name}: expected a DICOM file, got a damaged one; export it again") from error
        if header.get("SOPClassUID") != _CT or "LOCALIZER" in (header.get("ImageType") or ()):
            others.add(header.get("SOPClassUID"))
        else:
            found.setdefault(str(need(header, "SeriesInstanceUID")), []).append(header)
    if not found:
        got = "files of other kinds" if others else "no DICOM file"
        mend = "give the folder that holds the CT slices"
        if others.intersection(_MULTI_FRAME):
            got, mend = "enhanced multi-frame CT", "export it as single slices (for example with emf2sf of dcm4che)"
        raise ValueError(f"{folder.name}: expected CT images with one slice per file, got {got}; {mend}")
    return found


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
            mine, theirs = (np.asarray(need(h, keyword), float) for h in (header, first))
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=1e-4, atol=1e-4):
                raise ValueError(
                    f"{_name(header)}: expected the {keyword} of {_name(first)}, got another; the series mixes grids, "
                    "so move the slices of each into a folder of their own"
                )
    along_row, along_column = np.asarray(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    if not np.allclose([np.linalg.norm(along_row), np.linalg.norm(normal)], 1, atol=1e-3):
        raise ValueError(
            f"{_name(first)}: expected two directions at right angles in ImageOrientationPatient, got "
            f"{list(first.ImageOrientationPatient)}; export the series again"
        )
    positions = np.array([np.asarray(need(header, "ImagePositionPatient"), float) for header in headers])
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    row_mm, column_mm = (float(mm) for mm in first.PixelSpacing)  # between rows, then between columns
    if len(headers) == 1:
        step = normal * float(need(first, "SliceThickness"))
    else:
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
        _check_spacing(headers, positions, normal, step, min(row_mm, column_mm))
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * column_mm, along_column * row_mm, step, positions[0]], axis=1)
    affine[:2] *= -1  # DICOM's x and y run to the left and the back, NIfTI's to the right and the front
    return headers, affine


def _check_spacing(headers: Sequence[Any], at: np.ndarray, normal: np.ndarray, step: np.ndarray, pixel_mm: float):
    gaps_mm = np.diff(at @ normal)
    usual_mm = float(np.sort(gaps_mm)[(len(gaps_mm) - 1) // 2])  # the lower median: missing slices only widen gaps
    for a, b, gap_mm in zip(headers, headers[1:], gaps_mm, strict=False):
        if gap_mm < 0.01:
            raise ValueError(
                f"{_name(b)}: expected one slice per place, got {_name(a)} at the same place "
                f"{_place(b)}; remove the copy, or give each phase a folder of its own"
            )
        if abs(gap_mm - usual_mm) > 0.1 * usual_mm:
            raise ValueError(
                f"{_name(b)}: expected {usual_mm:.4g} mm to the slice before it ({_name(a)}), got {gap_mm:.4g} mm "
                f"at {_place(b)}; find the missing slices, or take the odd ones out"
            )
    off_mm = np.linalg.norm(at - (at[0] + np.arange(len(at))[:, None] * step), axis=1)
    worst = int(off_mm.argmax())
    if off_mm[worst] > 0.5 * pixel_mm:
        raise ValueError(
            f"{_name(headers[worst])}: expected slices along one straight line at one distance, got one "
            f"{off_mm[worst]:.2g} mm off; the series is not one regular grid"
        )


def read_slice(file: Path) -> tuple[Any, np.ndarray]:
    """A slice's dataset and its stored numbers `(rows, columns)`, 16 bits each."""
    from pydicom import dcmread
    from pydicom.pixels import get_decoder

    again = "export the series again, uncompressed"
    try:
        dataset = dcmread(file)
        syntax = dataset.file_meta.TransferSyntaxUID
        layout = [dataset.get(k) for k in ("SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")]
    except Exception as error:
        raise ValueError(f"{file.name}: expected a DICOM slice, got a damaged file; export it again") from error
    if layout not in ([1, 16, "MONOCHROME1"], [1, 16, "MONOCHROME2"]) or "ModalityLUTSequence" in dataset:
        raise ValueError(f"{file.name}: expected 16-bit grey values with a rescale slope, got {layout}; {again}")
    if not syntax.is_little_endian:  # retired in 2006; overlays and private data would come out with bytes swapped
        raise ValueError(f"{file.name}: expected little endian, got {syntax.name}; convert it with dcmconv +te")
    try:
        decodable = not syntax.is_encapsulated or get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        raise ValueError(
            f"{file.name}: expected pixels that can be decoded, got {syntax.name} and no decoder for it; "
            "pip install 'pylibjpeg[all]'"
        )
    try:
        stored = dataset.pixel_array
    except Exception as error:
        raise ValueError(f"{file.name}: expected whole pixel data, got less or damaged; export it again") from error
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ValueError(f"{file.name}: expected one slice per file, got {stored.shape}; {again}")
    return dataset, stored


def rescale(dataset: Any) -> tuple[float, float]:
    slope, intercept = (float(need(dataset, keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    kind = dataset.get("RescaleType") or "HU"
    if slope == 0 or not np.isfinite([slope, intercept]).all() or kind not in ("HU", "US"):
        raise ValueError(
            f"{_name(dataset)}: expected a rescale to HU, got slope {slope:g}, intercept {intercept:g}, type {kind}; "
            "give the CT series itself"
        )
    return slope, intercept


def slice_hu(dataset: Any, stored: np.ndarray) -> np.ndarray:
    slope, intercept = rescale(dataset)
    return (stored * slope + intercept).astype(np.float32)


def _nifti_header(stack: np.ndarray, affine: np.ndarray) -> Any:
    """The header of the NIfTI file that holds this series: int16 where that loses nothing."""
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


def need(header: Any, keyword: str) -> Any:
    try:
        value = header.get(keyword)
    except Exception as error:  # a value that is no number where one belongs
        raise ValueError(f"{_name(header)}: expected a valid DICOM tag {keyword}; export the series again") from error
    if value is None or value == "":
        raise ValueError(f"{_name(header)}: expected the DICOM tag {keyword}, got none; export the series again")
    return value


def _place(header: Any) -> str:
    return "({:g}, {:g}, {:g}) mm".format(*header.ImagePositionPatient)


def _name(header: Any) -> str:
    return Path(header.filename).name
