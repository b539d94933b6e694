"""Everything between a file and a tensor: NIfTI and DICOM in and out, data sets' layouts, splits by patient, phantoms.

A volume is `(slice, row, column)` in HU; stage 1 (`prepare`) writes whole cases, and `Cases` gives them to training.
"""

from .cases import Cases
from .classes import in_words
from .coarser import coarser_copy
from .dicom import Series, read_series
from .dicom_out import check_folder, write_series
from .dicom_seg import write_segmentation
from .layouts import find_cases
from .nifti import check_nifti_name, write_scan
from .phantoms import abdominal_phantom, organ_mask
from .preparation import cases_of, prepare
from .read import read_label, read_low_dose, read_scan
from .scan import Scan, check_place
from .splits import split_patients

__all__ = [
    "Cases",
    "Scan",
    "Series",
    "abdominal_phantom",
    "cases_of",
    "check_folder",
    "check_nifti_name",
    "check_place",
    "coarser_copy",
    "find_cases",
    "in_words",
    "organ_mask",
    "prepare",
    "read_label",
    "read_low_dose",
    "read_scan",
    "read_series",
    "split_patients",
    "write_scan",
    "write_segmentation",
    "write_series",
]
