"""The CT slices of a folder by series, with every file accounted for: read, named in a note, or an error."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CT = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME = (f"{CT}.1", f"{CT}.2")  # enhanced, and legacy converted enhanced
_SUFFIXES = (".dcm", ".dicom", ".ima", ".img", ".dic")
_COMPANIONS = ("dicomdir", "readme", "license", "version", "thumbs.db", "autorun.inf", "desktop.ini")
_ONE_SUBJECT = {
    "PatientID": "patients",
    "StudyInstanceUID": "studies",
    "FrameOfReferenceUID": "frames of reference",
}
_TELLING = [  # what tells one acquisition from another, where it is there
    *("AcquisitionNumber", "AcquisitionUID", "IrradiationEventUID", "TemporalPositionIdentifier", "AcquisitionDate"),
    *("AcquisitionTime", "ContentTime", "InstanceNumber", "ConvolutionKernel", "KVP", "ContrastBolusAgent"),
    *("NominalPercentageOfCardiacPhase", "EchoNumbers", "SeriesDescription"),
]
HEADER = [
    *("SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "ImageType", "Rows", "Columns"),
    *("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", *_ONE_SUBJECT, *_TELLING),
]


def ct_series(folder: Path) -> dict[str, list[Any]]:
    """The headers of all CT slices (or of multi-frame files) below a folder, by SeriesInstanceUID.

    Links to folders are followed. A file that claims to be DICOM must be readable; it claims so by its preamble, by
    its suffix, or by being named like the DICOM files beside it. Slices without preamble are read. What is no CT
    slice is counted and named in one warning.

    Raises:
        ValueError: the folder is missing or holds no CT, a file that claims to be DICOM cannot be read, or one series
            has two patients, studies or frames of reference.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder.name}: expected a folder of DICOM files, got none at {folder}; check the path")
    files = list(_files(folder))
    alike = {(file.parent, _suffix(file)) for file in files if _has_preamble(file)}
    found: dict[str, list[Any]] = {}
    others: list[str] = []
    for file in files:
        header = _header(file, claims=_suffix(file) in _SUFFIXES or (file.parent, _suffix(file)) in alike)
        if header is not None and is_ct(header):
            found.setdefault(str(need(header, "SeriesInstanceUID")), []).append(header)
        elif file.name.lower() != "dicomdir" and not file.name.endswith((".nii", ".nii.gz")):  # an index; a mask beside
            others.append(file.name if header is None else f"{file.name} ({_kind(header)})")
    if not found:
        got = f"files of other kinds ({_few(others)})" if others else "no DICOM file"
        raise ValueError(
            f"{folder.name}: expected CT images with one slice per file, or enhanced multi-frame CT, got {got}; "
            "give the folder that holds the CT slices"
        )
    for series in found.values():
        _check_one_subject(series)
    if others:
        number = f"{len(others)} file{'s' * (len(others) > 1)}"
        warnings.warn(f"{folder.name}: passed over {number} without CT slices: {_few(others)}", stacklevel=3)
    return found


def is_dicom_file(path: Path) -> bool:
    """Whether a file is, or claims to be, DICOM."""
    return _suffix(path) in _SUFFIXES[:3] or _has_preamble(path) or _starts_as_dataset(path)


def is_ct(header: Any) -> bool:
    """Whether this is the header of CT pixels; a blank SOPClassUID counts where the modality is CT."""
    kind = str(header.get("SOPClassUID") or "")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        return False
    return kind == CT or kind in MULTI_FRAME or (not kind and header.get("Modality") == "CT")


def need(header: Any, keyword: str) -> Any:
    """The value of a tag that has to be there."""
    try:
        value = header.get(keyword)
    except Exception as error:  # a value that is no number where one belongs
        raise ValueError(
            f"{name_of(header)}: expected a valid DICOM tag {keyword}, got one that cannot be read; "
            "export the series again"
        ) from error
    if value is None or value == "":
        raise ValueError(f"{name_of(header)}: expected the DICOM tag {keyword}, got none; export the series again")
    return value


def name_of(header: Any) -> str:
    """The file's name, for sentences."""
    return Path(header.filename).name


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in order, hidden ones left out; a link that leads back up is not followed twice."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(where, name)
            if name.startswith("."):
                continue
            if not file.exists():
                raise ValueError(f"{name}: expected a file, got a broken link; restore its target, or remove it")
            if file.is_file():
                yield file


def _header(file: Path, *, claims: bool) -> Any:
    """The file's header; None for a file that is not DICOM and does not claim to be."""
    from pydicom import dcmread

    if file.name.lower().partition(".")[0] in _COMPANIONS or file.name.lower() in _COMPANIONS:
        claims = False
    has_preamble = _has_preamble(file)
    if not (claims or has_preamble or _starts_as_dataset(file)):
        return None
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=HEADER, force=not has_preamble)
        kind, modality = (str(header.get(keyword) or "") for keyword in ("SOPClassUID", "Modality"))
        media = str(getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") or "")
        _decode(header)
    except Exception as error:  # what pydicom raises on damage is of many kinds
        raise ValueError(f"{file.name}: expected a DICOM file, got a damaged one; export it again") from error
    if modality == "CT" and kind and kind not in (CT, *MULTI_FRAME) and not _known(kind):
        raise ValueError(
            f"{file.name}: expected the class of a CT image in the DICOM tag SOPClassUID, got {kind[:64]!r}, which no "
            f"class has; export it again, or take it out of {file.parent.name}"
        )
    if not (kind or modality) and _known(media) and media != CT:  # DICOMDIR says what it is here alone
        header.SOPClassUID = kind = media
    if kind or modality:
        return header
    got = "an empty one" if not file.stat().st_size else "one that is cut short or no DICOM at all"
    raise ValueError(
        f"{file.name}: expected a DICOM file, got {got}; export it again, or take it out of {file.parent.name}"
    )


def _decode(header: Any) -> None:
    """Read every tag now, since pydicom decodes late; one that only helps to tell slices apart may be unreadable."""
    for keyword in HEADER:
        try:
            str(header.get(keyword))
        except Exception:
            if keyword not in _TELLING:
                raise
            delattr(header, keyword)


def _known(kind: str) -> bool:
    from pydicom.uid import UID_dictionary

    return kind in UID_dictionary


def _has_preamble(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _starts_as_dataset(file: Path) -> bool:
    """Whether a file begins as a DICOM data set without preamble does: groups 2 or 8, little endian, a short value."""
    with file.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8 or start[0] not in (2, 8) or start[1] or start[3]:
        return False
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    return explicit or int.from_bytes(start[4:8], "little") < 1024


def _suffix(file: Path) -> str:
    """The suffix, lower case; none where a name is a number or a UID."""
    return "" if file.suffix[1:].isdigit() else file.suffix.lower()


def _kind(header: Any) -> str:
    from pydicom.uid import UID_dictionary

    if "LOCALIZER" in (header.get("ImageType") or ()):
        return "localizer"
    kind = str(header.get("SOPClassUID") or "")
    return UID_dictionary[kind][0] if kind in UID_dictionary else str(header.get("Modality") or "of unknown kind")


def _few(names: list[str], most: int = 5) -> str:
    listed = ", ".join(names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def _check_one_subject(headers: list[Any]) -> None:
    for keyword, several in _ONE_SUBJECT.items():
        values = {str(header.get(keyword) or "").strip(): name_of(header) for header in headers}
        if len(values) > 1:
            names = " and ".join(sorted(values.values())[:2])
            raise ValueError(
                f"{names}: expected one {keyword} in a series, got {len(values)} under one SeriesInstanceUID; "
                f"put the slices of the different {several} into folders of their own"
            )
