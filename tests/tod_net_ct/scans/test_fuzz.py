"""Damaged headers, by the hundred: one sentence, or what an independent reader makes of the same bytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")

from examples.tod_net_ct.scans import read_scan, read_series  # noqa: E402

from .test_dicom import series_of  # noqa: E402
from .test_nifti import save, voxels_hu  # noqa: E402

FEW = settings(
    max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DAMAGE = st.tuples(st.integers(0, 10_000), st.sampled_from(["flip", "zero", "ones", "cut", "text"]), st.integers(0, 7))


def damaged(content: bytes, at: int, how: str, bit: int) -> bytes:
    changed = bytearray(content)
    if how == "flip":
        changed[at] ^= 1 << bit
    elif how == "cut":
        del changed[at:]
    else:
        filler = {"zero": b"\0", "ones": b"\xff", "text": b"7"}[how] * (bit + 1)
        changed[at : at + len(filler)] = filler
    return bytes(changed)


def one_sentence(error: ValueError) -> None:
    text = str(error)
    assert type(error) is ValueError and "\n" not in text and ": " in text and len(text) < 600, text


@FEW
@given(damage=DAMAGE, number=st.integers(0, 3))
def test_dicom(tmp_path, damage, number):
    at, how, bit = damage
    folder = tmp_path / "series"
    if not folder.exists():
        series_of(folder)
        series_of(tmp_path / "whole")
    for file in sorted((tmp_path / "whole").iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
    file = folder / f"IM{number}.dcm"
    content = file.read_bytes()
    in_header = content.index(b"\xe0\x7f\x10\x00")  # the pixels have no header to damage
    file.write_bytes(damaged(content, at % in_header, how, bit))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            volume_hu = read_series(folder).volume_hu.numpy()
        except ValueError as error:
            one_sentence(error)
            return
        if any(f"passed over 1 file without CT slices: {file.name}" in str(note.message) for note in notes):
            return  # by now another kind of file, and said so
        assert np.array_equal(volume_hu, by_pydicom(folder)), f"{how} at {at % in_header}"


def by_pydicom(folder: Path) -> np.ndarray:
    """Every file, sorted by its height: four of them, whatever else is said of them."""
    slices = [pydicom.dcmread(file, force=True) for file in sorted(folder.iterdir())]
    for ds in slices:
        if "TransferSyntaxUID" not in ds.file_meta:
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    slices.sort(key=lambda ds: ds.ImagePositionPatient[2])
    return np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])


@FEW
@given(damage=DAMAGE)
def test_nifti(tmp_path, damage):
    at, how, bit = damage
    whole = tmp_path / "whole.nii"
    if not whole.exists():
        save(whole, voxels_hu((6, 7, 8)))
    path = tmp_path / "odd.nii"
    path.write_bytes(damaged(whole.read_bytes(), at % 352, how, bit))
    try:
        volume_hu = read_scan(path).volume_hu.numpy()
    except ValueError as error:
        one_sentence(error)
        return
    theirs = np.asarray(nib.Nifti1Image.from_filename(path).dataobj, dtype=np.float32)
    assert np.array_equal(np.sort(volume_hu, axis=None), np.sort(theirs, axis=None)), f"{how} at {at % 352}"
