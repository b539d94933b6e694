"""A label map as a DICOM segmentation object, which a viewer lays over the series that it was drawn on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..run import replacing
from .dicom import Series

_MAY_BE_EMPTY = (  # type 2 in the standard: a segmentation copies them, and many exports leave them out
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientName", "PatientID"),
    *("PatientBirthDate", "PatientSex", "PositionReferenceIndicator"),
)
_CODED = {"liver": "Liver", "kidney": "Kidney", "tumour": "Neoplasm", "pancreas": "Pancreas", "spleen": "Spleen"}


def write_segmentation(
    path: Path, label: Tensor, like: Series, files: Sequence[Path], names: Sequence[str], *, method: str
) -> Path:
    """Write class numbers as one binary segment for each class above 0, through highdicom.

    Identifiers are hashes of the series and the label map, so the same result is the same object again.

    Args:
        path: a name in `.dcm`; it appears whole or not at all.
        label: `(D, H, W)` whole numbers in the working orientation.
        like: the series whose grid the label map has.
        files: the slices that it is laid over, in the order of `like.slices`.
        names: what the classes from 1 on are called.
        method: what drew them, for the segments' algorithm.

    Raises:
        ValueError: highdicom is not installed, or the series lacks a tag that a segmentation must take from it.
    """
    try:
        import highdicom as hd
    except ImportError as error:
        raise ValueError(f"{path.name}: a DICOM segmentation needs highdicom; pip install 'taskloss[ct]'") from error
    from pydicom import dcmread, uid
    from pydicom.sr.codedict import codes

    values = np.flip(label.cpu().numpy().astype(np.uint8), tuple(k for k in range(3) if like.flipped[k]))
    frames = np.ascontiguousarray(values.transpose(np.argsort(like.axes)).transpose(2, 1, 0))  # slices, rows, columns
    entropy = [
        str(dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID),
        hashlib.sha256(frames.data).hexdigest(),
    ]

    def concept(name: str) -> Any:
        return getattr(codes.SCT, _CODED.get(name, "AnatomicalStructure"))

    algorithm = hd.AlgorithmIdentificationSequence("taskloss tod_net_ct", codes.DCM.ArtificialIntelligence, method)
    segments = [
        hd.seg.SegmentDescription(k, name, codes.SCT.AnatomicalStructure, concept(name), "AUTOMATIC", algorithm)
        for k, name in enumerate(names, start=1)
    ]
    try:
        made = hd.seg.Segmentation(
            source_images=[_completed(dcmread(file)) for file in files],
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=uid.generate_uid(entropy_srcs=[*entropy, "series"]),
            series_number=2000,
            sop_instance_uid=uid.generate_uid(entropy_srcs=[*entropy, "object"]),
            instance_number=1,
            manufacturer="taskloss",
            manufacturer_model_name="examples.tod_net_ct denoise",
            software_versions=method,
            device_serial_number="0",
            series_description="labels of the denoised scan",
            omit_empty_frames=bool(frames.any()),
        )
    except (AttributeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{path.name}: expected a series with what a segmentation takes from it, got one without ({reason}); "
            "give --output a NIfTI name and no DICOM input, or export the series with all its tags"
        ) from error
    with replacing(path) as unfinished:
        made.save_as(unfinished, enforce_file_format=True)
    return path


def _completed(dataset: Any) -> Any:
    for keyword in _MAY_BE_EMPTY:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    return dataset
