"""Series folders as strangers have them: no file is dropped without a word, no two scans become one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pydicom = pytest.importorskip("pydicom")

from examples.tod_net_ct.scans import read_series, write_series  # noqa: E402

from .test_dicom import hu_at, make_slice, save, series_of  # noqa: E402

SMOOTH = (12, 5, 6)


@pytest.fixture
def axial(tmp_path):
    return series_of(tmp_path / "axial")


def smooth_hu(shift=0.0):
    """Slices that change little by little, from air to bone."""
    z, y, x = np.meshgrid(*[np.arange(n) for n in SMOOTH], indexing="ij")
    return (1000 * np.sin((z + shift) / 9 + y / 3 + x / 4)).astype(np.int16)


def slices_of(hu, **how):
    return [make_slice(s, k, **how) for k, s in enumerate(hu)]


@pytest.mark.parametrize("name", ["IM3.dcm", "IM0.dcm"], ids=["last", "first"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got an empty one"),
        (b"not a picture at all", "got one that is cut short or no DICOM at all"),
        (bytes(200), "got one that is cut short or no DICOM at all"),
        ("header", "expected (a|the) DICOM (file|tag)"),
        ("meta", "got one that is cut short"),
        ("pixels", "expected whole pixel data, got less or damaged"),
    ],
    ids=["empty", "text", "zeros", "cut in the header", "cut in the meta header", "cut in the pixels"],
)
def test_an_end_slice_that_cannot_be_read_is_an_error(axial, name, content, words):
    file = axial / name
    whole = file.read_bytes()
    cut = {"header": whole.index(b"1.2.3.7") - 8, "meta": 300, "pixels": len(whole) - 20}
    file.write_bytes(whole[: cut[content]] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
        read_series(axial)


def test_a_file_named_like_the_slices_beside_it_claims_to_be_one(tmp_path):
    names = ["1.2.840.1", "1.2.840.2", "1.2.840.3", "1.2.840.4"]
    folder = save(tmp_path / "in", slices_of(hu_at()), names=names)
    (folder / "README").write_text("a companion")
    with pytest.warns(UserWarning, match="^in: passed over 1 file without CT slices: README$"):
        read_series(folder)
    (folder / "1.2.840.4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^1.2.840.4: expected a DICOM file, got an empty one; export it again, or"):
        read_series(folder)


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
@pytest.mark.parametrize("name", ["IM0.dcm", "IM0"])
def test_slices_without_preamble_are_read(tmp_path, axial, implicit, name):
    expected = read_series(axial).volume_hu
    first = pydicom.dcmread(axial / "IM0.dcm")
    del first.file_meta
    first.preamble = None
    (axial / "IM0.dcm").unlink()
    first.save_as(axial / name, implicit_vr=implicit, little_endian=True)
    assert (axial / name).read_bytes()[:1] == b"\x08"  # no preamble, no meta header
    scan = read_series(axial)
    assert torch.equal(scan.volume_hu, expected)
    write_series(tmp_path / "out", scan.volume_hu + 1, scan)
    assert torch.equal(read_series(tmp_path / "out").volume_hu, expected + 1)


def test_links_to_folders_are_followed_once(tmp_path, axial):
    expected = read_series(axial).volume_hu
    half = tmp_path / "half"
    half.mkdir()
    for name in ("IM2.dcm", "IM3.dcm"):
        (axial / name).rename(half / name)
    os.symlink(half, axial / "rest")
    os.symlink(axial, axial / "loop")
    assert torch.equal(read_series(axial).volume_hu, expected)
    os.symlink(tmp_path / "gone", axial / "IM9.dcm")
    with pytest.raises(ValueError, match="^IM9.dcm: expected a file, got a broken link; restore its target"):
        read_series(axial)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientID", "P18"), ("PatientID", ""), ("StudyInstanceUID", "1.2.99"), ("FrameOfReferenceUID", "1.2.98")],
)
def test_one_series_is_of_one_patient_and_study(tmp_path, keyword, value):
    slices = slices_of(hu_at())
    setattr(slices[3], keyword, value)
    words = f"IM.*: expected one {keyword} in a series, got 2 under one SeriesInstanceUID; put the slices of"
    with pytest.raises(ValueError, match=words):
        read_series(save(tmp_path / "in", slices))


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "InstanceNumber", "AcquisitionTime", "ConvolutionKernel"])
def test_two_acquisitions_are_not_interleaved(tmp_path, keyword):
    slices = slices_of(smooth_hu())
    for k, ds in enumerate(slices):
        ds.InstanceNumber = k + 1
        second, within = k % 2, k // 2
        value = {
            "AcquisitionNumber": 1 + second,
            "InstanceNumber": 1 + 6 * second + within,
            "AcquisitionTime": f"1200{30 * second + within:02d}.500",
            "ConvolutionKernel": ("B30f", "B70f")[second],
        }[keyword]
        setattr(ds, keyword, value)
    with pytest.raises(ValueError, match=rf"expected the slices of one acquisition, got another's .*\(by {keyword}, "):
        read_series(save(tmp_path / "in", slices))


def test_two_acquisitions_without_a_tag_are_told_by_their_content(tmp_path):
    hu = smooth_hu()
    hu[1::2] = np.roll(hu[1::2], 2, axis=2) + 150
    slices = slices_of(hu)
    with pytest.raises(ValueError, match=r"^IM1.dcm: expected the slices of one acquisition, got .*\(by content"):
        read_series(save(tmp_path / "in", slices))


def test_a_scan_in_steps_and_any_numbering_is_one_scan(tmp_path):
    slices = slices_of(smooth_hu())
    for k, ds in enumerate(slices):
        ds.AcquisitionNumber, ds.AcquisitionTime = 1 + k // 4, f"1200{k // 4:02d}"
        ds.KVP = "120" if k % 2 else "120.0"
        ds.InstanceNumber = (7 * k) % 12
    assert np.array_equal(read_series(save(tmp_path / "in", slices)).volume_hu.numpy(), smooth_hu())


@pytest.mark.parametrize("high", [15, 13], ids=lambda high: f"high bit {high}")
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_bits_that_lie_higher_are_the_same_hu(tmp_path, high, signed):
    hu = hu_at()
    slices = slices_of(hu, signed=signed, intercept=0.0 if signed else -1024.0)
    for ds in slices:
        stored = ds.pixel_array.astype(np.int32)
        raised = (stored << (high - 11)) & 0xFFFF | (0 if high == 15 else 0xC000)  # an overlay above, noise below
        ds.PixelData = (raised | 0x1).astype("<u2").tobytes()
        ds.BitsStored, ds.HighBit = 12, high
    scan = read_series(save(tmp_path / "in", slices))
    assert np.array_equal(scan.volume_hu.numpy(), hu)
    write_series(tmp_path / "out", scan.volume_hu, scan)
    assert np.array_equal(read_series(tmp_path / "out").volume_hu.numpy(), hu)


def test_a_blank_class_is_read_by_its_modality(tmp_path, axial):
    slices = slices_of(hu_at())
    for ds in slices:
        ds.SOPClassUID = ""
    folder = save(tmp_path / "in", slices)
    scan = read_series(folder)
    assert torch.equal(scan.volume_hu, read_series(axial).volume_hu)
    write_series(tmp_path / "out", scan.volume_hu, scan)
    made = pydicom.dcmread(tmp_path / "out" / "slice-0001.dcm")
    assert made.SOPClassUID == made.file_meta.MediaStorageSOPClassUID == pydicom.uid.CTImageStorage


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("PixelSpacing", [0, 0.7], r"expected positive lengths in mm in the DICOM tag PixelSpacing, got \[0.0, 0.7\]"),
        ("PixelSpacing", [0.7], "expected 2 finite numbers in the DICOM tag PixelSpacing, got 0.7"),
        ("ImagePositionPatient", [1, 2], "expected 3 finite numbers in the DICOM tag ImagePositionPatient"),
        ("ImageOrientationPatient", [1, 0, 0], "expected 6 finite numbers in the DICOM tag ImageOrientationPatient"),
        ("BitsStored", 17, "expected up to 16 bits stored below HighBit, got BitsStored 17, HighBit 11"),
        ("HighBit", 5, "expected up to 16 bits stored below HighBit, got BitsStored 12, HighBit 5"),
        ("Rows", 65535, "expected (slices of at most 67,108,864 pixels|the Rows of)"),
    ],
)
def test_a_tag_that_cannot_be_is_named(tmp_path, keyword, value, words):
    slices = slices_of(hu_at())
    for ds in slices:
        setattr(ds, keyword, value)
        if keyword == "Rows":
            ds.Columns = 65535
    with pytest.raises(ValueError, match=words):
        read_series(save(tmp_path / "in", slices))


def frames_of(folder, slices):
    """The slices as one multi-frame file."""
    import highdicom

    needed = dict.fromkeys(("ReferringPhysicianName", "PositionReferenceIndicator", "Laterality"), "")
    noon, day = pydicom.valuerep.TM("120000"), pydicom.valuerep.DA("20200304")
    needed |= dict.fromkeys(("StudyTime", "AcquisitionTime", "ContentTime"), noon)
    needed |= dict.fromkeys(("AcquisitionDate", "ContentDate"), day) | {"AcquisitionNumber": 1}
    for ds in slices:
        for keyword, value in (needed | {"Manufacturer": "x", "SoftwareVersions": "1"}).items():
            setattr(ds, keyword, value)
    legacy = highdicom.legacy.LegacyConvertedEnhancedCTImage
    made = legacy(slices, series_instance_uid="1.2.33", series_number=9, sop_instance_uid="1.2.34", instance_number=1)
    folder.mkdir()
    made.save_as(folder / "all.dcm", enforce_file_format=True)
    return folder


def test_enhanced_multi_frame_is_the_scan_of_its_slices(tmp_path, axial):
    pytest.importorskip("highdicom")
    frames, single = read_series(frames_of(tmp_path / "frames", slices_of(hu_at()))), read_series(axial)
    assert torch.equal(frames.volume_hu, single.volume_hu)
    assert frames.voxel_mm == pytest.approx(single.voxel_mm)
    np.testing.assert_allclose(frames.grid_affine, single.grid_affine, atol=1e-6)
