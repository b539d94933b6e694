"""DICOM series in and out: `examples.tod_net_ct.scans`, on series that the tests write themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402  # noqa: E402
    JPEG2000,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from examples.tod_net_ct.scans import (  # noqa: E402  # noqa: E402
    check_folder,
    read_label,
    read_scan,
    read_series,  # noqa: E402
    write_scan,
    write_series,
)

AXIAL = (1, 0, 0, 0, 1, 0)
FEET_FIRST = (-1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)
TILTED = (1, 0, 0, 0, 0.9659258, -0.2588190)
SHAPE = (4, 5, 6)  # slices, rows, columns
SPACING_MM = (0.8, 0.7)  # between rows, between columns
STEP_MM = 2.5


def hu_at(shape=SHAPE, seed=0):
    """Whole HU from air to bone, no two slices alike."""
    return np.random.default_rng(seed).integers(-1000, 1200, shape).astype(np.int16)


def make_slice(hu, k, orientation=AXIAL, step=None, slope=1.0, intercept=-1024.0, signed=False, uid_root="1.2.3"):
    """One CT slice with the identifiers that a hospital's would have."""
    normal = np.cross(orientation[:3], orientation[3:])
    position = np.array([-20.0, -30.5, 40.25]) + k * STEP_MM * (normal if step is None else np.asarray(step))
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{uid_root}.9.{k + 1}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.8", f"{uid_root}.7", "1.2.6"
    ds.Modality, ds.PatientName, ds.PatientID, ds.StudyID = "CT", "Doe^Jane", "P17", "S4"
    ds.PatientBirthDate, ds.PatientSex, ds.StudyDate, ds.AccessionNumber = "19700102", "F", "20200304", "A5"
    ds.SeriesNumber, ds.SeriesDescription, ds.InstanceNumber = 3, "Abdomen 2.5 B30f", 100 - k
    ds.ImageType, ds.KVP, ds.ConvolutionKernel = ["ORIGINAL", "PRIMARY", "AXIAL"], 120, "B30f"
    ds.ImagePositionPatient = [float(f"{x:.6f}") for x in position]
    ds.ImageOrientationPatient = list(orientation)
    ds.PixelSpacing, ds.SliceThickness = list(SPACING_MM), STEP_MM
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = slope, intercept, "HU"
    ds.WindowCenter, ds.WindowWidth, ds.BurnedInAnnotation = 40, 400, "NO"
    ds.SmallestImagePixelValue, ds.LargestImagePixelValue = 7, 7  # stale once a pixel changes
    ds.add_new(0x00091001, "LO", "private")
    stored = np.rint((hu.astype(float) - intercept) / slope).astype(np.int16 if signed else np.uint16)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.set_pixel_data(stored, "MONOCHROME2", 16 if signed else 12, generate_instance_uid=False)
    ds["SmallestImagePixelValue"].VR = ds["LargestImagePixelValue"].VR = "SS" if signed else "US"
    return ds


def save(folder: Path, slices, names=None, syntax=ExplicitVRLittleEndian) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, ds in enumerate(slices):
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
            CTImageStorage,
            ds.SOPInstanceUID,
        )
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(folder / (names[k] if names else f"IM{k}.dcm"), enforce_file_format=True)
    return folder


def series_of(folder, hu=None, **how) -> Path:
    return save(folder, [make_slice(s, k, **how) for k, s in enumerate(hu_at() if hu is None else hu)])


@pytest.fixture
def axial(tmp_path):
    return series_of(tmp_path / "axial")


def as_nifti(path, hu, orientation=AXIAL, step=None):
    """The same series as a NIfTI file, built from the equation in DICOM's part 3, C.7.6.2.1.1, voxel by voxel."""
    normal = np.cross(orientation[:3], orientation[3:])

    def position(column, row, k):
        start = np.array([-20.0, -30.5, 40.25]) + k * STEP_MM * (normal if step is None else np.asarray(step))
        across = (
            np.asarray(orientation[:3]) * SPACING_MM[1] * column + np.asarray(orientation[3:]) * SPACING_MM[0] * row
        )
        return (start + across) * [-1, -1, 1]  # to the right, the front and the head

    affine = np.eye(4)
    affine[:3, 3] = position(0, 0, 0)
    for axis, unit in enumerate(np.eye(3)):
        affine[:3, axis] = position(*unit) - position(0, 0, 0)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


@pytest.mark.parametrize(
    ("orientation", "step"),
    [(AXIAL, None), (FEET_FIRST, None), (SAGITTAL, None), (TILTED, (0, 0, 1))],
    ids=["axial", "feet first", "sagittal", "tilted gantry"],
)
def test_a_series_is_the_same_scan_as_its_nifti(tmp_path, orientation, step):
    scan = read_series(series_of(tmp_path / "in", orientation=orientation, step=step))
    other = read_scan(as_nifti(tmp_path / "same.nii", hu_at(), orientation, step))
    assert torch.equal(scan.volume_hu, other.volume_hu)
    assert scan.voxel_mm == pytest.approx(other.voxel_mm, abs=1e-5)
    assert (scan.axes, scan.flipped) == (other.axes, other.flipped)
    np.testing.assert_allclose(scan.affine, other.affine, atol=1e-5)
    write_scan(tmp_path / "out.nii", scan.volume_hu, like=scan)
    back = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(back.affine, other.affine, atol=1e-4)
    assert int(back.header["qform_code"]) == (0 if step else 1)  # a qform cannot hold a shear
    assert back.header.get_xyzt_units()[0] == "mm" and back.get_data_dtype() == np.int16
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(nib.load(tmp_path / "same.nii").dataobj))


def test_monai_s_reader_sees_the_same_grid(axial):
    """An independent reader; it takes voxel size and axes from the same tags by its own way."""
    monai_data = pytest.importorskip("monai.data")
    reader = monai_data.PydicomReader()  # it sorts by InstanceNumber, which runs downwards here
    array, meta = reader.get_data(reader.read(str(axial)))
    scan = read_series(axial)
    to_mine = np.linalg.inv(scan.affine) @ np.asarray(meta["affine"])
    theirs = np.indices(array.shape).reshape(3, -1)
    mine = (to_mine[:3, :3] @ theirs + to_mine[:3, 3:]).round(3)
    assert np.array_equal(mine, np.rint(mine))
    column, row, k = mine.astype(int)
    assert np.array_equal(array[tuple(theirs)], scan.volume_hu.numpy()[k, row, column])


def test_slices_are_sorted_by_place_alone(tmp_path, axial):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    for k, ds in enumerate(slices):
        ds.InstanceNumber = (2, 4, 1, 3)[k]
    shuffled = save(tmp_path / "shuffled", slices, names=["d", "b.dcm", "sub-a", "c.ima"])
    (shuffled / "readme.txt").write_text("not DICOM")
    (shuffled / ".hidden").write_bytes((axial / "IM0.dcm").read_bytes())
    with pytest.warns(UserWarning, match="^shuffled: passed over 1 file without CT slices: readme.txt$"):
        scan = read_series(shuffled)
    assert [file.name for file in scan.slices] == ["d", "b.dcm", "sub-a", "c.ima"]
    assert torch.equal(scan.volume_hu, read_series(axial).volume_hu)
    assert scan.volume_hu[0, 0].tolist() == hu_at()[0, 0].tolist()  # lowest slice first, its first row in front


def test_rescale_is_each_slice_s_own(tmp_path):
    hu = hu_at() // 4 * 4
    rescales = [(1.0, -1024.0), (2.0, -1000.0), (0.5, -1500.0), (4.0, 0.0)]
    slices = [make_slice(hu[k], k, slope=m, intercept=b, signed=True) for k, (m, b) in enumerate(rescales)]
    scan = read_series(save(tmp_path / "in", slices))
    assert np.array_equal(scan.volume_hu.numpy(), hu)
    changed_hu = scan.volume_hu + 4.0 * (scan.volume_hu > 0)
    write_series(tmp_path / "out", changed_hu, scan)
    back = read_series(tmp_path / "out")
    assert torch.equal(back.volume_hu, changed_hu)
    assert [float(pydicom.dcmread(file).RescaleSlope) for file in back.slices] == [m for m, _ in rescales]


@pytest.mark.parametrize("orientation", [AXIAL, FEET_FIRST, SAGITTAL], ids=["axial", "feet first", "sagittal"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_round_trip_is_exact_and_equals_the_nifti_route(tmp_path, orientation, signed):
    source = series_of(tmp_path / "in", orientation=orientation, signed=signed, intercept=0.0 if signed else -1024.0)
    scan = read_series(source)
    generator = torch.Generator().manual_seed(0)
    volume_hu = torch.randint(-1024, 3072, scan.volume_hu.shape, generator=generator).float()
    write_series(tmp_path / "out", volume_hu, scan)
    write_scan(tmp_path / "out.nii", volume_hu, scan)
    back, nifti = read_series(tmp_path / "out"), read_scan(tmp_path / "out.nii")
    assert torch.equal(back.volume_hu, volume_hu) and torch.equal(nifti.volume_hu, volume_hu)
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-9)
    np.testing.assert_allclose(nifti.affine, back.affine, atol=1e-4)


def test_a_derived_series_keeps_the_patient_and_says_what_it_is(tmp_path, axial):
    scan = read_series(axial)
    write_series(tmp_path / "out", scan.volume_hu * 0 + 40, scan, method="Denoised by a test")
    new_series, new_images = set(), set()
    for source_file, file in zip(scan.slices, read_series(tmp_path / "out").slices, strict=True):
        source, made = pydicom.dcmread(source_file), pydicom.dcmread(file)
        for keyword in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate"),
            *("AccessionNumber", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient"),
            *("PixelSpacing", "SliceThickness", "InstanceNumber", "KVP", "ConvolutionKernel", "RescaleSlope"),
            *("RescaleIntercept", "RescaleType", "WindowCenter", "BurnedInAnnotation", "Modality", "BitsStored"),
            *("SOPClassUID", "PixelRepresentation", "PhotometricInterpretation"),
        ):
            assert made[keyword].value == source[keyword].value, keyword
        assert made[0x00091001].value == "private"
        assert list(made.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert made.SeriesDescription == "Abdomen 2.5 B30f denoised" and made.SeriesNumber == 1003
        assert made.DerivationDescription == "Denoised by a test"
        (reference,) = made.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == CTImageStorage
        assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert "SmallestImagePixelValue" not in made and "LossyImageCompression" not in made
        assert made.file_meta.MediaStorageSOPInstanceUID == made.SOPInstanceUID
        assert made.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert made.SOPInstanceUID.is_valid and made.SeriesInstanceUID.is_valid
        new_series.add(made.SeriesInstanceUID)
        new_images.add(made.SOPInstanceUID)
    assert len(new_series) == 1 and new_series.isdisjoint({"1.2.3.7"})
    assert len(new_images) == 4 and new_images.isdisjoint({f"1.2.3.9.{k + 1}" for k in range(4)})


def test_the_same_result_is_the_same_series_and_another_is_not(tmp_path, axial):
    scan = read_series(axial)
    folders = [
        write_series(tmp_path / f"out{i}", scan.volume_hu + add, scan, method=method)
        for i, (add, method) in enumerate([(0, ""), (0, ""), (1, ""), (0, "other")])
    ]
    contents = [[file.read_bytes() for file in sorted(folder.iterdir())] for folder in folders]
    assert contents[0] == contents[1]
    assert len({read_uid(folder) for folder in folders}) == 3


def test_the_derived_series_is_valid_to_the_letter(tmp_path, axial, monkeypatch):
    scan = read_series(axial)
    write_series(tmp_path / "out", scan.volume_hu, scan, method="Denoised")
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)
    for file in (tmp_path / "out").iterdir():
        made = pydicom.dcmread(file)  # with its preamble and meta header
        str(made)  # reads every value
        made.save_as(tmp_path / "again.dcm", enforce_file_format=True)
        assert (tmp_path / "again.dcm").read_bytes() == file.read_bytes()


def test_a_bare_image_type(tmp_path):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    for ds in slices:
        ds.ImageType = "ORIGINAL"
        del ds.SeriesDescription, ds.SeriesNumber
    scan = read_series(save(tmp_path / "in", slices))
    write_series(tmp_path / "out", scan.volume_hu, scan)
    made = pydicom.dcmread(tmp_path / "out" / "slice-0001.dcm")
    assert list(made.ImageType) == ["DERIVED", "SECONDARY"] and made.SeriesDescription == "denoised"


def read_uid(folder):
    return pydicom.dcmread(folder / "slice-0001.dcm").SeriesInstanceUID


def test_no_value_wraps_around(tmp_path, axial):
    scan = read_series(axial)
    volume_hu = scan.volume_hu.clone()
    volume_hu[0, 0, :3] = torch.tensor([-5000.0, 70_000.0, 20_000.0])
    with pytest.warns(UserWarning, match="^out: 2 voxels lay beyond what 16 bits hold and were clipped"):
        write_series(tmp_path / "out", volume_hu, scan)
    back_hu = read_series(tmp_path / "out").volume_hu
    assert back_hu[0, 0, :3].tolist() == [-1024, 65535 - 1024, 20_000]  # the first slice left its 12 bits
    assert torch.equal(back_hu[1:], scan.volume_hu[1:])
    assert [pydicom.dcmread(f).BitsStored for f in sorted((tmp_path / "out").iterdir())] == [16, 12, 12, 12]


def test_padding_stays_padding(tmp_path):
    slices = [make_slice(s, k, signed=True, intercept=-1024.0) for k, s in enumerate(hu_at())]
    for ds in slices:
        ds.PixelPaddingValue = -2000
        ds["PixelPaddingValue"].VR = "SS"
        stored = ds.pixel_array.copy()
        stored[0, :2] = -2000
        ds.set_pixel_data(stored, "MONOCHROME2", 16, generate_instance_uid=False)
    scan = read_series(save(tmp_path / "in", slices))
    assert float(scan.volume_hu[2, 0, 1]) == -3024
    write_series(tmp_path / "out", torch.full_like(scan.volume_hu, 40.0), scan)
    for file in read_series(tmp_path / "out").slices:
        stored = pydicom.dcmread(file).pixel_array
        assert (stored[0, :2] == -2000).all() and (stored[1:] == 1064).all()


@pytest.mark.parametrize("kind", ["rle", "implicit", "monochrome1"])
def test_other_storage_of_the_same_slices(tmp_path, axial, kind):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    syntax = ImplicitVRLittleEndian if kind == "implicit" else ExplicitVRLittleEndian
    for ds in slices:
        if kind == "rle":
            ds.compress(RLELossless, generate_instance_uid=False)
            syntax = RLELossless
        elif kind == "monochrome1":
            ds.PhotometricInterpretation = "MONOCHROME1"
    scan = read_series(save(tmp_path / "in", slices, syntax=syntax))
    assert torch.equal(scan.volume_hu, read_series(axial).volume_hu)
    write_series(tmp_path / "out", scan.volume_hu, scan)
    back = read_series(tmp_path / "out")
    assert torch.equal(back.volume_hu, scan.volume_hu)
    made = pydicom.dcmread(back.slices[0])
    assert made.file_meta.TransferSyntaxUID == (
        ImplicitVRLittleEndian if kind == "implicit" else ExplicitVRLittleEndian
    )
    assert made.PhotometricInterpretation == ("MONOCHROME1" if kind == "monochrome1" else "MONOCHROME2")


def test_what_was_lossy_stays_lossy(tmp_path):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    for ds in slices:
        ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 8
    scan = read_series(save(tmp_path / "in", slices))
    write_series(tmp_path / "out", scan.volume_hu, scan)
    made = pydicom.dcmread(tmp_path / "out" / "slice-0001.dcm")
    assert made.LossyImageCompression == "01" and made.LossyImageCompressionRatio == 8


def test_one_slice_is_a_volume(tmp_path):
    scan = read_series(series_of(tmp_path / "in", hu_at((1, 5, 6))))
    assert scan.volume_hu.shape == (1, 5, 6) and scan.voxel_mm == pytest.approx((2.5, 0.8, 0.7))


def test_of_several_series_one_is_chosen(tmp_path):
    first = series_of(tmp_path / "both")
    save(first / "deeper", [make_slice(s, k, uid_root="1.2.4") for k, s in enumerate(hu_at(seed=1))])
    words = r"both: expected one CT series, got 2 series; choose one with --series UID out of 1\.2\.[34]\.7 \(Abdomen "
    with pytest.raises(ValueError, match=words):
        read_series(first)
    with pytest.raises(
        ValueError, match=r"both: expected one CT series, got no series 9; choose one with --series UID"
    ):
        read_series(first, "9")
    assert np.array_equal(read_series(first, "1.2.4.7").volume_hu.numpy(), hu_at(seed=1))


def test_localizers_and_other_kinds_are_passed_over(tmp_path, axial):
    scout = make_slice(hu_at()[0], 0, orientation=SAGITTAL, uid_root="1.2.5")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    report = make_slice(hu_at()[0], 0, uid_root="1.2.9")
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture
    save(axial, [scout, report], names=["scout.dcm", "dose.dcm"])
    words = (
        r"^axial: passed over 2 files without CT slices: dose.dcm \(Secondary Capture .*\), scout.dcm \(localizer\)$"
    )
    with pytest.warns(UserWarning, match=words):
        assert len(read_series(axial).slices) == 4


def without(keyword):
    def change(slices):
        delattr(slices[1], keyword)

    return change


def with_(keyword, value, every=False):
    def change(slices):
        for ds in slices if every else slices[1:2]:
            setattr(ds, keyword, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda slices: slices.pop(2),
            r"IM2.dcm: expected 2.5 mm to the slice before it \(IM1.dcm\), got 5 mm at \(-20, -30.5, 47.75\) mm; find "
            "the missing slices",
        ),
        (
            with_("ImagePositionPatient", [-20.0, -30.5, 40.25]),
            r"IM1.dcm: expected one slice per place, got IM0.dcm at the same place \(-20, -30.5, 40.25\) mm; remove",
        ),
        (
            with_("ImagePositionPatient", [-10.0, -30.5, 42.75]),
            "IM1.dcm: expected slices along one straight line at one distance, got one 10 mm off",
        ),
        (
            with_("ImageOrientationPatient", list(FEET_FIRST)),
            "IM1.dcm: expected the ImageOrientationPatient of IM0.dcm",
        ),
        (with_("PixelSpacing", [0.7, 0.8]), "IM1.dcm: expected the PixelSpacing of IM0.dcm, got another; the series"),
        (with_("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], every=True), "IM0.dcm: expected two directions at right"),
        (without("ImagePositionPatient"), "IM1.dcm: expected the DICOM tag ImagePositionPatient, got none; export"),
        (without("PixelSpacing"), "IM1.dcm: expected the DICOM tag PixelSpacing, got none; export the series again"),
        (without("RescaleIntercept"), "IM1.dcm: expected the DICOM tag RescaleIntercept, got none; export the series"),
        (with_("RescaleSlope", 0), "IM1.dcm: expected a rescale to HU, got slope 0, intercept -1024, type HU; give"),
        (with_("RescaleType", "Z_EFF"), "IM1.dcm: expected a rescale to HU, got .* type Z_EFF; give the CT series"),
        (with_("PhotometricInterpretation", "RGB"), "IM1.dcm: expected 16-bit grey values with a rescale slope, got"),
        (with_("PixelData", b"\0" * 20), "IM1.dcm: expected whole pixel data, got less or damaged; export it again"),
        (
            with_("SOPClassUID", f"{CTImageStorage}.1", every=True),
            "in: expected one multi-frame file in a series, got IM0.dcm, IM1.dcm, IM2.dcm, IM3.dcm; give",
        ),
        (with_("SOPClassUID", "1.2.840.10008.5.1.4.1.1.4", every=True), "in: expected CT images .* got files of other"),
        (with_("RescaleIntercept", 1024, every=True), "in: expected HU .air near -1000., got values from"),
    ],
)
def test_bad_series(tmp_path, change, words):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    change(slices)
    with pytest.raises(ValueError, match=words):
        read_series(save(tmp_path / "in", slices))


def test_bad_folders(tmp_path, axial):
    with pytest.raises(ValueError, match="^gone: expected a folder of DICOM files, got none at .*gone; check the path"):
        read_series(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="^empty: expected CT images with one slice per file, .* got no DICOM file; give"
    ):
        read_series(tmp_path / "empty")
    (axial / "IM2.dcm").write_bytes((axial / "IM2.dcm").read_bytes()[:-30])
    with pytest.raises(ValueError, match="^IM2.dcm: expected "):
        read_series(axial)


def test_compressed_without_a_decoder(tmp_path, monkeypatch):
    slices = [make_slice(s, k) for k, s in enumerate(hu_at())]
    for ds in slices:
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f" * 10])
        ds["PixelData"].is_undefined_length = True
    folder = save(tmp_path / "in", slices, syntax=JPEG2000)
    decoder = pydicom.pixels.get_decoder(JPEG2000)
    monkeypatch.setattr(type(decoder), "is_available", property(lambda self: False))
    with pytest.raises(
        ValueError, match=r"IM0.dcm: .* got JPEG 2000 Image Compression and no decoder for it; pip install 'pylibjpeg"
    ):
        read_series(folder)


def test_folders_that_are_not_written_to(tmp_path, axial):
    scan = read_series(axial)
    for target in (axial, axial / "new", axial.parent):
        with pytest.raises(
            ValueError, match="expected a folder apart from the input, got one that is, holds or lies in"
        ):
            write_series(target, scan.volume_hu, scan, overwrite=True)
    used = tmp_path / "used"
    used.mkdir()
    (used / "slice-0001.dcm").write_bytes(b"old")
    with pytest.raises(ValueError, match="^used: expected a new or empty folder, got one that is not; add --overwrite"):
        write_series(used, scan.volume_hu, scan)
    assert (used / "slice-0001.dcm").read_bytes() == b"old"
    write_series(used, scan.volume_hu, scan, overwrite=True)
    assert len(read_series(used).slices) == 4
    (used / "thesis.docx").write_bytes(b"precious")
    with pytest.raises(ValueError, match="^used: expected nothing but a series to overwrite, got thesis.docx; give"):
        write_series(used, scan.volume_hu, scan, overwrite=True)
    with pytest.raises(ValueError, match="^new: expected the folder .*gone to exist, got none; make it first"):
        check_folder(tmp_path / "gone" / "new", axial)
    with pytest.raises(ValueError, match="^thesis.docx: expected a folder for the series, got a file; give another"):
        check_folder(used / "thesis.docx", axial)


def test_a_failure_leaves_the_old_series(tmp_path, axial, monkeypatch):
    scan = read_series(axial)
    write_series(tmp_path / "out", scan.volume_hu, scan)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.dcm")}
    count = []
    real = pydicom.Dataset.save_as

    def fails(self, *args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pydicom.Dataset, "save_as", fails)
    with pytest.raises(ValueError, match="^out: expected to write here, got No space left on device; make room"):
        write_series(tmp_path / "out", scan.volume_hu + 1, scan, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.dcm")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["axial", "out"]


def test_a_series_that_cannot_take_its_name_gives_it_back(tmp_path, axial, monkeypatch):
    scan = read_series(axial)
    out = write_series(tmp_path / "out", scan.volume_hu, scan)
    real = Path.rename

    def fails(self, target):
        if self.name.startswith(".new"):
            raise OSError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ValueError, match="^out: expected to write here, got Permission denied; make room, or"):
        write_series(out, scan.volume_hu + 1, scan, overwrite=True)
    assert torch.equal(read_series(out).volume_hu, scan.volume_hu)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["axial", "out"]


def test_bad_volumes(tmp_path, axial):
    scan = read_series(axial)
    with pytest.raises(ValueError, match=r"^out: expected a volume of 4x5x6, got 5x6; give the scan's own"):
        write_series(tmp_path / "out", scan.volume_hu[0], scan)
    with pytest.raises(ValueError, match="^out: expected finite HU to write, got NaN"):
        write_series(tmp_path / "out", scan.volume_hu * float("nan"), scan)
    assert not (tmp_path / "out").exists()


def test_a_label_drawn_on_the_nifti_copy_fits_the_series(tmp_path):
    scan = read_series(series_of(tmp_path / "in", orientation=FEET_FIRST))
    drawn = (hu_at() > 0).astype(np.uint8)
    as_nifti(tmp_path / "label.nii", drawn, FEET_FIRST)
    assert torch.equal(read_label(tmp_path / "label.nii", like=scan), (scan.volume_hu > 0).to(torch.uint8))


def test_a_scanner_s_own_series():
    """Five slices of a real gated chest CT that pydicom ships, with file names in reverse order."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"
    if not (folder / "98892001").is_dir():
        pytest.skip("this pydicom ships no test series")
    with pytest.warns(UserWarning, match="98892001: passed over 2 files .*: 6293 .localizer., 6924 .localizer."):
        scan = read_series(folder / "98892001")
    assert [file.name for file in scan.slices] == ["3353", "3023", "2693", "2392", "2062"]
    assert scan.voxel_mm == pytest.approx((2.5, 0.488281, 0.488281))
    words = "17136: expected 1.25 mm to the slice before it .17106., got 202.5 mm at"
    with pytest.raises(ValueError, match=words), pytest.warns(UserWarning, match="passed over 3 files"):
        read_series(folder / "77654033")
