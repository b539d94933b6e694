"""CT as DICOM out: a denoised volume becomes a series of its own, derived from the one that was read."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .dicom import Series, read_slice, rescale, slice_hu
from .dicom_folder import CT
from .scan import check_like

# What describes the pixels of the source and not those of its derivative: extremes, thumbnail, signatures.
_STALE = (
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("IconImageSequence", "DigitalSignaturesSequence", "MACParametersSequence"),
    *("InstanceCreationDate", "InstanceCreationTime"),
)


def write_series(
    folder: str | os.PathLike[str], volume_hu: Tensor, like: Series, *, method: str = "", overwrite: bool = False
) -> Path:
    """Write a volume as a new series of the same study: one file per slice, each derived from the slice of its place.

    Patient, study, frame of reference, geometry and all else stay; the series and its images get new identifiers,
    and say what they are derived from and how. The identifiers are hashes of the source's and of the volume, so the
    same result is the same series again, and another result never is. Pixels are uncompressed and keep the source's
    slope and intercept: a voxel whose HU is unchanged (or that is padding) keeps its stored number, any other takes
    the nearest one. What 16 bits cannot hold is clipped, with a warning. The folder appears whole or not at all.

    Args:
        folder: a new or empty folder.
        volume_hu: `(D, H, W)` in HU, in the working orientation.
        like: the series that the volume was made from; its files are read again.
        method: what was done, for DerivationDescription.
        overwrite: whether a series of the same kind that lies there is replaced.

    Raises:
        ValueError: the shape is wrong, a voxel is not finite, the folder is in use, or it cannot be written.
    """
    folder = check_folder(folder, like.path, overwrite=overwrite)
    check_like(folder, volume_hu, like)
    values = np.ascontiguousarray(volume_hu.detach().cpu().numpy(), np.float32)
    content = hashlib.sha256(values.data).hexdigest() + method
    values = np.flip(values, tuple(k for k in range(3) if like.flipped[k])).transpose(np.argsort(like.axes))
    clipped = 0
    with _replacing_folder(folder) as unfinished:
        for k, file in enumerate(like.slices):
            dataset, stored = read_slice(file)
            stored, beyond = _to_stored(dataset, stored, values[:, :, k].T)
            clipped += beyond
            _derive(dataset, stored, content, method)
            dataset.save_as(unfinished / f"slice-{k + 1:04d}.dcm", enforce_file_format=True)
    if clipped:
        warnings.warn(f"{folder.name}: {clipped} voxels lay beyond what 16 bits hold and were clipped", stacklevel=2)
    return folder


def check_folder(folder: str | os.PathLike[str], source: Path, *, overwrite: bool = False) -> Path:
    """Return the folder that a series is to be written to.

    Raises:
        ValueError: it overlaps the source, its parent is missing, or it is in use: by anything without `overwrite`,
            by anything but `.dcm` files with it.
    """
    folder, inside = Path(folder).absolute(), Path(source).resolve()
    target = folder.resolve()
    if target == inside or target in inside.parents or inside in target.parents:
        raise ValueError(
            f"{folder.name}: expected a folder apart from the input, got one that is, holds or lies in it; "
            "give another --output"
        )
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.name}: expected the folder {folder.parent} to exist, got none; make it first")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder.name}: expected a folder for the series, got a file; give another --output")
    held = list(folder.iterdir()) if folder.exists() else []
    if held and not overwrite:
        raise ValueError(
            f"{folder.name}: expected a new or empty folder, got one that is not; add --overwrite to replace the "
            "series in it"
        )
    strangers = [path.name for path in held if path.suffix != ".dcm" or not path.is_file()]
    if strangers:
        raise ValueError(
            f"{folder.name}: expected nothing but a series to overwrite, got {min(strangers)}; give another --output"
        )
    return folder


def _to_stored(dataset: Any, source: np.ndarray, wanted_hu: np.ndarray) -> tuple[np.ndarray, int]:
    """The numbers to store for a slice in HU, and how many had to be clipped."""
    slope, intercept = rescale(dataset)
    kept = wanted_hu == slice_hu(dataset, source)
    if (padding := dataset.get("PixelPaddingValue")) is not None:
        limit = dataset.get("PixelPaddingRangeLimit", padding)
        bits = [int(end) & 0xFFFF for end in (padding, limit)]  # some files mix up the sign
        ends = np.array(bits, np.uint16).view(source.dtype)
        kept |= (source >= ends.min()) & (source <= ends.max())
    limits = np.iinfo(source.dtype)
    wanted = np.where(kept, source, np.rint((wanted_hu.astype(np.float64) - intercept) / slope))
    stored = wanted.clip(limits.min, limits.max).astype(source.dtype)
    return stored, int((wanted != stored).sum())


def _derive(dataset: Any, stored: np.ndarray, content: str, method: str) -> None:
    """Turn a slice's dataset into that of its derivative."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sr.codedict import codes

    def renamed(source: str) -> str:
        return uid.generate_uid(entropy_srcs=[source, content])

    def code(concept: Any) -> Any:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = concept.value, "DCM", concept.meaning
        return [item]

    syntax = dataset.file_meta.TransferSyntaxUID
    lossy = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.JPEG2000MC)
    if syntax in (*lossy, uid.HTJ2K) and "LossyImageCompression" not in dataset:
        dataset.LossyImageCompression = "01"  # once lossy, always lossy
    dataset.SOPClassUID = dataset.get("SOPClassUID") or CT  # blank in some public series
    source, made = Dataset(), Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    source.PurposeOfReferenceCodeSequence = code(codes.DCM.SourceImageForImageProcessingOperation)
    made.PurposeOfReferenceCodeSequence = code(codes.DCM.ProcessingEquipment)
    made.Manufacturer, made.ManufacturerModelName = "taskloss", "examples.tod_net_ct denoise"
    dataset.SourceImageSequence = [source]
    dataset.ContributingEquipmentSequence = [*dataset.get("ContributingEquipmentSequence", ()), made]
    kinds = dataset.get("ImageType") or ()
    dataset.ImageType = ["DERIVED", "SECONDARY", *(() if isinstance(kinds, str) else kinds[2:])]
    dataset.DerivationDescription = method or "Denoised"
    dataset.SeriesDescription = f"{(dataset.get('SeriesDescription') or '')[:55]} denoised".strip()  # at most 64
    if dataset.get("SeriesNumber") is not None:
        dataset.SeriesNumber = int(dataset.SeriesNumber) + 1000  # apart from the source in a viewer's list
    dataset.SeriesInstanceUID = renamed(dataset.SeriesInstanceUID)
    dataset.SOPInstanceUID = renamed(dataset.SOPInstanceUID)
    for keyword in _STALE:
        if keyword in dataset:
            delattr(dataset, keyword)
    bits = int(dataset.BitsStored)
    signed = stored.dtype.kind == "i"
    if stored.max() >= 2 ** (bits - signed) or stored.min() < -(2 ** (bits - 1)):
        bits = 16
    plain = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax if syntax in plain else uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.set_pixel_data(stored, dataset.PhotometricInterpretation, bits, generate_instance_uid=False)


@contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder beside `folder`; give it that name on success, remove it on any failure."""
    unfinished, old = (folder.with_name(f".{kind}-{uuid.uuid4().hex[:12]}-{folder.name}") for kind in ("new", "old"))
    try:
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    except OSError as error:
        raise ValueError(
            f"{folder.name}: expected to write here, got {error.strerror or error}; make room, or give another folder"
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
