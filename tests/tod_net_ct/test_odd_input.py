"""The tables of docs/denoise.md, row by row: each kind of odd input does what its row says, in the row's own words."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")

from examples.tod_net_ct.__main__ import main  # noqa: E402
from examples.tod_net_ct.networks import Denoiser, save_checkpoint  # noqa: E402
from tests.tod_net_ct.scans import test_strange_nifti as odd_nifti  # noqa: E402
from tests.tod_net_ct.scans.test_dicom import hu_at, make_slice, save, series_of, with_, without  # noqa: E402
from tests.tod_net_ct.scans.test_nifti import save as save_nifti  # noqa: E402
from tests.tod_net_ct.scans.test_nifti import voxels_hu  # noqa: E402
from tests.tod_net_ct.scans.test_strange_series import frames_of, slices_of, smooth_hu  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

PAGE = (Path(__file__).parents[2] / "docs" / "denoise.md").read_text(encoding="utf-8")
ODD = PAGE[PAGE.index("## Odd input") : PAGE.index("## DICOM out")]
ROWS = dict(
    re.fullmatch(r"\| (.*?) \| (.*) \|", line).groups()
    for line in ODD.splitlines()
    if line.startswith("| ") and "what happens" not in line
)


def changed(change, hu=None, **how):
    """A series folder of slices that were changed together."""

    def build(tmp: Path) -> Path:
        slices = slices_of(hu_at() if hu is None else hu, **how)
        change(slices)
        return save(tmp / "in", slices)

    return build


def beside(name, content):
    """A good series with one more or one other file."""

    def build(tmp: Path) -> Path:
        folder = series_of(tmp / "in")
        path = folder / name
        whole = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        path.write_bytes(content(whole) if callable(content) else content)
        return folder

    return build


def linked(target):
    def build(tmp: Path) -> Path:
        folder = series_of(tmp / "in")
        (tmp / "half").mkdir()
        (folder / "IM3.dcm").rename(tmp / "half" / "IM3.dcm")
        os.symlink(tmp / target, folder / "rest")
        os.symlink(folder, folder / "loop")
        return folder

    return build


def bare(implicit):
    def build(tmp: Path) -> Path:
        folder = series_of(tmp / "in")
        for path in folder.iterdir():
            dataset = pydicom.dcmread(path)
            del dataset.file_meta
            dataset.preamble = None
            dataset.save_as(path, implicit_vr=implicit, little_endian=True)
        return folder

    return build


def raised(slices):
    for ds in slices:
        ds.PixelData = (ds.pixel_array << 4).astype("<u2").tobytes()
        ds.HighBit = 15


def in_turns(keyword, values):
    def change(slices):
        for k, ds in enumerate(slices):
            setattr(ds, keyword, values[k % 2])

    return change


def of_syntax(name, data):
    def build(tmp: Path) -> Path:
        slices = slices_of(hu_at())
        for ds in slices:
            ds.PixelData = data
            ds["PixelData"].is_undefined_length = True
        return save(tmp / "in", slices, syntax=getattr(pydicom.uid, name))

    return build


def big_endian(tmp: Path) -> Path:
    folder = tmp / "in"
    folder.mkdir()
    for k, ds in enumerate(slices_of(hu_at())):
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
            ds.SOPClassUID,
            ds.SOPInstanceUID,
        )
        ds.PixelData = ds.pixel_array.astype(">u2").tobytes()
        pydicom.dcmwrite(folder / f"IM{k}.dcm", ds, implicit_vr=False, little_endian=False)
    return folder


def others(tmp: Path) -> Path:
    folder = series_of(tmp / "in")
    scout = make_slice(hu_at()[0], 0, uid_root="1.2.5")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    save(folder, [scout], names=["scout.dcm"])
    (folder / "README").write_text("a companion")
    return folder


def in_8_bits(slices):
    for ds in slices:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = bytes(30)


def nifti(voxels, **how):
    return lambda tmp: save_nifti(tmp / "odd.nii", voxels, **how)


def header(offset, form, *values, name="odd.nii"):
    return lambda tmp: odd_nifti.altered(tmp, offset, form, *values, name=name)


def packed(change):
    def build(tmp: Path) -> Path:
        content = save_nifti(tmp / "good.nii", voxels_hu()).read_bytes()
        (tmp / "odd.nii.gz").write_bytes(change(content))
        return tmp / "odd.nii.gz"

    return build


def bad_sum(content):
    whole = bytearray(gzip.compress(content))
    whole[-6] ^= 1
    return bytes(whole)


def colours(tmp: Path) -> Path:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(np.zeros((3, 4, 5), kind), np.eye(4)).to_filename(tmp / "odd.nii")
    return tmp / "odd.nii"


def with_nan():
    voxels = voxels_hu().astype(np.float32)
    voxels[0, 0, 0] = np.nan
    return voxels


READ = "read"
CASES = {  # how a row begins -> what is tried, and the row's words for what happens
    "slices without preamble": [(bare(False), READ), (bare(True), READ)],
    "a link to a folder": [(linked("half"), READ)],
    "blank SOPClassUID": [(changed(with_("SOPClassUID", "", every=True)), READ)],
    "enhanced or legacy": [(lambda tmp: frames_of(tmp / "in", slices_of(hu_at())), READ)],
    "12 bits that lie higher": [(changed(raised), READ)],
    "README, notes": [(others, "passed over 2 files without CT slices: ")],
    "an empty, cut or garbage": [
        (beside("IM3.dcm", b""), "expected a DICOM file, got an empty one"),
        (beside("more.dcm", b"not a picture"), "one that is cut short or no DICOM at all"),
        (beside("IM3.dcm", lambda whole: whole[:300]), "one that is cut short or no DICOM at all"),
    ],
    "a link whose target": [(linked("gone"), "expected a file, got a broken link")],
    "two patients": [(changed(with_("PatientID", "P18")), "expected one PatientID in a series, got 2")],
    "two acquisitions": [
        (changed(in_turns(keyword, values), smooth_hu()), "expected the slices of one acquisition, got another's")
        for keyword, values in (("AcquisitionNumber", (1, 2)), ("ConvolutionKernel", ("B30f", "B70f")))
    ],
    "a missing, double": [
        (changed(lambda slices: slices.pop(2)), "expected 2.5 mm to the slice before it"),
        (changed(with_("ImagePositionPatient", [-20.0, -30.5, 40.25])), "expected one slice per place"),
        (changed(with_("ImagePositionPatient", [-10.0, -30.5, 42.75])), "expected slices along one straight line"),
        (changed(with_("PixelSpacing", [0.7, 0.8])), "expected the PixelSpacing of"),
    ],
    "PixelSpacing 0": [
        (changed(with_("PixelSpacing", [0, 0.7], every=True)), "expected positive lengths in mm in the DICOM tag"),
        (changed(with_("PixelSpacing", [0.7], every=True)), "expected 2 finite numbers in the DICOM tag"),
        (changed(without("PixelSpacing")), "expected the DICOM tag PixelSpacing, got none"),
    ],
    "65535 x 65535": [
        (
            changed(lambda slices: [setattr(ds, k, 65535) for ds in slices for k in ("Rows", "Columns")]),
            "expected slices of at most 67,108,864 pixels",
        )
    ],
    "pixels cut short": [
        (changed(with_("PixelData", b"\0" * 20)), "expected whole pixel data"),
        (changed(with_("PhotometricInterpretation", "RGB")), "expected 16-bit grey values with a rescale slope"),
        (changed(in_8_bits), "expected 16-bit grey values with a rescale slope"),
        (changed(with_("ModalityLUTSequence", [])), "expected 16-bit grey values with a rescale slope"),
    ],
    "compressed without a decoder": [
        (of_syntax("JPEG2000", pydicom.encaps.encapsulate([b"\xff\x4f" * 10])), "pip install 'pylibjpeg[all]'"),
        (of_syntax("MPEG2MPML", pydicom.encaps.encapsulate([b"\0\0" * 10])), "pip install 'pylibjpeg[all]'"),
        (big_endian, "dcmconv +te"),
    ],
    "NIfTI-1 or -2": [
        (nifti(voxels_hu()), READ),
        (nifti(voxels_hu()[..., None]), READ),
        (nifti(voxels_hu().astype(">i2")), READ),
    ],
    "a header that promises more": [
        (header(42, "3h", 1000, 1000, 1000), "its header promises"),
        (header(42, "3h", 2000, 2000, 2000, name="odd.nii.gz"), "expected at most 2,147,483,648 voxels"),
    ],
    "a gzip bomb": [
        (packed(lambda content: gzip.compress(content + bytes(2**25))), "expected little or nothing behind the voxels"),
        (packed(bad_sum), "got a truncated or damaged one"),
        (packed(lambda content: gzip.compress(content)[:-40]), "got a truncated or damaged one"),
        (packed(lambda content: gzip.compress(content[:-40])), "got a truncated or damaged one"),
    ],
    "unknown datatype": [
        (header(offset, form, value), "expected a NIfTI header with")
        for offset, form, value in ((70, "h", 4242), (40, "h", 9), (108, "f", 0.0), (123, "B", 7))
    ]
    + [(header(112, "2f", 1.0, float("nan")), "expected a NIfTI header with")],
    "4-D, colours": [
        (nifti(np.stack([voxels_hu()] * 2, -1)), "expected three axes of voxels"),
        (colours, "one number per voxel"),
        (header(280, "4f", 0.0, 0.0, 0.0, 0.0), "an affine with three independent axes"),
        (nifti(with_nan()), "a finite HU"),
    ],
    "a label map": [
        (nifti(volume.numpy().astype(np.float32)), "expected HU (air near -1000), got values from")
        for volume, _ in odd_nifti.NOT_HU.values()
    ],
}
ELSEWHERE = {  # rows about a run's folder: the test that breaks one
    "a file of a finished stage": ("run/test_integrity.py", "test_a_missing_and_a_foreign_file_are_told"),
    "a manifest or `begun.json`": (
        "run/test_integrity.py",
        "test_a_manifest_that_is_none_does_not_vouch_for_anything",
    ),
    "a `last.pt`": ("training/test_training.py", "test_a_point_that_is_another_s_is_told"),
    "a bit flipped in weights": ("networks/test_denoiser.py", "test_a_flipped_bit_in_a_weight_is_told"),
    "a bit flipped in a resampled": ("scans/test_cases.py", "test_a_damaged_resampled_case_is_made_again"),
    "a damaged `summary.json`": ("report/test_damage.py", "test_a_summary_that_is_none"),
    "a `patients.csv`": (
        "scans/test_layouts.py",
        "test_a_patients_file_that_could_part_a_patient_s_cases_is_refused",
    ),
    "another process": ("run/test_integrity.py", "test_other_settings_stay_outside_while_a_process_works"),
    "a setting out of its range": ("run/test_ranges.py", "test_a_value_out_of_its_range_is_told_with_the_range"),
}


def row_of(start: str) -> str:
    (cell,) = [cell for row, cell in ROWS.items() if row.startswith(start)]
    return cell


def test_every_row_is_tried_and_nothing_else_is() -> None:
    starts = [*CASES, *ELSEWHERE]
    assert all(sum(row.startswith(start) for start in starts) == 1 for row in ROWS), ROWS
    assert len(starts) == len(ROWS)


@pytest.mark.parametrize("start", CASES)
def test_a_row_says_what_happens(start, tmp_path, capsys, monkeypatch) -> None:
    if start == "enhanced or legacy":
        pytest.importorskip("highdicom")
    if start == "compressed without a decoder":
        decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEG2000)
        monkeypatch.setattr(type(decoder), "is_available", property(lambda self: False))
    torch.manual_seed(0)
    checkpoint = save_checkpoint(tmp_path / "d.pt", Denoiser(1))
    for number, (build, words) in enumerate(CASES[start]):
        own = tmp_path / str(number)
        own.mkdir()
        output = own / "out.nii"
        command = ["denoise", "--checkpoint", str(checkpoint), "--input", str(build(own)), "--output", str(output)]
        code, said = main(command), capsys.readouterr().err
        told = [line for line in said.splitlines() if "expected" in line]
        noted = [line for line in said.splitlines() if line.startswith("note: ")]
        if words == READ or words.startswith("passed over"):
            assert code == 0 and output.exists() and not told, (number, said)
            assert words == READ or (len(noted) == 1 and words in noted[0]), (number, said)
        else:
            assert code == 2 and not output.exists() and len(told) == 1 and words in told[0], (number, words, said)
        row = row_of(start).replace("`", "")
        assert row.startswith(("read", "followed")) if words == READ else words in row, (words, row)


@pytest.mark.parametrize("start", ELSEWHERE)
def test_a_row_about_a_run_s_folder_has_its_test(start) -> None:
    file, name = ELSEWHERE[start]
    assert row_of(start)
    assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
