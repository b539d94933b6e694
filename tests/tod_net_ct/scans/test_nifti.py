"""Laws and errors of NIfTI in `examples.tod_net_ct.scans`: what is read comes back as it was."""

import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tod_net_ct.dose import to_hu, to_unit
from examples.tod_net_ct.run import replacing
from examples.tod_net_ct.scans import find_cases, read_label, read_low_dose, read_scan, write_scan

nib = pytest.importorskip("nibabel")

ORIENTATIONS = [
    "".join(signs[axis] for axis in order)
    for order in itertools.permutations(range(3))
    for signs in itertools.product("LR", "PA", "IS")
]


def voxels_hu(shape=(3, 4, 5), dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(dtype)


def affine_of(codes="RAS", voxel_mm=(0.7, 0.8, 2.5), origin_mm=(-30.0, 12.0, 900.0)):
    affine = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        row, sign = {"L": (0, -1), "R": (0, 1), "P": (1, -1), "A": (1, 1), "I": (2, -1), "S": (2, 1)}[code]
        affine[row, axis] = sign * voxel_mm[axis]
    affine[:, 3] = (*origin_mm, 1)
    return affine


def save(path, voxels, affine=None, **header):
    image = nib.Nifti1Image(voxels, affine_of() if affine is None else affine, dtype=header.pop("dtype", None))
    image.header.set_xyzt_units(header.pop("units", "mm"), "sec")
    slope_inter = header.pop("slope_inter", None)
    if slope_inter:
        image.header.set_slope_inter(*slope_inter)
    for field, value in header.items():
        image.header[field] = value
    image.to_filename(path)
    return path


@pytest.fixture
def scan(tmp_path):
    return read_scan(save(tmp_path / "volume-12.nii", voxels_hu()))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_any_orientation_comes_back_bit_for_bit(tmp_path, codes):
    path = save(tmp_path / "in.nii", voxels_hu(), affine_of(codes), qform_code=1, sform_code=2, descrip=b"made up")
    scan = read_scan(path)
    write_scan(tmp_path / "out.nii", scan.volume_hu, scan)
    assert (tmp_path / "out.nii").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "PIL", "ASL"])
def test_one_body_in_any_orientation_reads_as_one_volume(tmp_path, codes):
    body = nib.Nifti1Image(voxels_hu(), affine_of("RAS"))
    target = nib.orientations.axcodes2ornt(codes)
    turned = body.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(body.affine), target))
    turned.to_filename(tmp_path / "turned.nii")
    scan = read_scan(tmp_path / "turned.nii")
    expected = np.flip(np.asarray(body.dataobj).transpose(2, 1, 0), (1, 2))  # slices up, rows back, columns left
    torch.testing.assert_close(scan.volume_hu, torch.from_numpy(expected.astype(np.float32)), rtol=0, atol=0)
    assert scan.voxel_mm == pytest.approx((2.5, 0.8, 0.7))


def test_oblique_volume_keeps_its_grid(tmp_path):
    angle = np.deg2rad(20)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = save(tmp_path / "in.nii", voxels_hu(), tilt @ affine_of("LPS"))
    scan = read_scan(path)
    assert scan.voxel_mm == pytest.approx((2.5, 0.8, 0.7))
    write_scan(tmp_path / "out.nii", scan.volume_hu, scan)
    assert (tmp_path / "out.nii").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", "<f4", ">f4", "<f8", "i1"])
def test_dtype_and_byte_order_are_kept(tmp_path, dtype):
    header = nib.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(np.dtype(dtype))
    voxels = np.clip(voxels_hu(), -100, 100) if dtype == "i1" else voxels_hu()
    nib.Nifti1Image(voxels.astype(dtype), affine_of(), header).to_filename(tmp_path / "in.nii")
    scan = read_scan(tmp_path / "in.nii")
    write_scan(tmp_path / "out.nii", scan.volume_hu, scan)
    assert (tmp_path / "out.nii").read_bytes() == (tmp_path / "in.nii").read_bytes()


def test_scaling_nifti2_gzip_trailing_axis_extension_and_units_are_kept(tmp_path):
    image = nib.Nifti2Image((voxels_hu() + 1024).astype(np.uint16)[..., None], affine_of("LAS"))
    image.header.set_slope_inter(0.5, -1024)
    image.header.set_xyzt_units("micron", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    image.to_filename(tmp_path / "in.nii.gz")
    scan = read_scan(tmp_path / "in.nii.gz")
    assert scan.voxel_mm == pytest.approx((2.5e-3, 0.8e-3, 0.7e-3))
    assert float(scan.volume_hu.min()) < -1000
    write_scan(tmp_path / "out.nii.gz", scan.volume_hu, scan)
    whole_in, whole_out = (gzip.decompress((tmp_path / f"{n}.nii.gz").read_bytes()) for n in ("in", "out"))
    assert whole_out == whole_in


def test_integer_files_round_and_clip(tmp_path):
    scan = read_scan(save(tmp_path / "in.nii", voxels_hu()))
    volume_hu = scan.volume_hu.clone()
    volume_hu[0, 0, :3] = torch.tensor([40.6, 1e6, -1e6])
    write_scan(tmp_path / "out.nii", volume_hu, scan)
    assert read_scan(tmp_path / "out.nii").volume_hu[0, 0, :3].tolist() == [41, 32767, -32768]


def test_a_failing_write_leaves_nothing(tmp_path, scan, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_scan(tmp_path / "out.nii.gz", scan.volume_hu, scan)
    assert [p.name for p in tmp_path.iterdir()] == ["volume-12.nii"]


def test_a_failing_write_leaves_the_earlier_file(tmp_path, scan, monkeypatch):
    def fill_the_disk(self, filename):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    (tmp_path / "out.nii").write_bytes(b"earlier")
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        write_scan(tmp_path / "out.nii", scan.volume_hu, scan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nii", "volume-12.nii"]
    assert (tmp_path / "out.nii").read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("name", "words"), [("out.mha", r"out.mha: expected a name in .nii"), ("no/out.nii", "make it first")]
)
def test_write_refuses_name(tmp_path, scan, name, words):
    with pytest.raises(ValueError, match=words):
        write_scan(tmp_path / name, scan.volume_hu, scan)


def test_write_refuses_shape_and_nan(tmp_path, scan):
    with pytest.raises(ValueError, match="out.nii: expected a volume of 5x4x3, got 3x4x5; give the scan's own shape"):
        write_scan(tmp_path / "out.nii", torch.zeros(3, 4, 5), scan)
    with pytest.raises(ValueError, match="out.nii: expected finite HU to write, got NaN"):
        write_scan(tmp_path / "out.nii", torch.full((5, 4, 3), float("nan")), scan)


def test_window():
    hu = torch.tensor([-1000.0, -200.0, 0.0, 200.0, 3000.0])
    assert to_unit(hu).tolist() == [0, 0, 0.5, 1, 1]
    assert to_hu(to_unit(hu)).tolist() == [-200, -200, 0, 200, 200]
    assert to_hu(torch.tensor([1.5]), (0, 100)).item() == 150
    with pytest.raises(ValueError, match="window_hu: expected \\(lower, upper\\) in HU, got \\(200, -200\\)"):
        to_unit(hu, (200, -200))


NAN = voxels_hu(dtype=np.float32)
NAN[0, 0, :2] = np.nan
SINGULAR = affine_of() * [[1, 0, 1, 1]]
BAD_SCANS = {
    "4-D": ({"voxels": voxels_hu((3, 4, 5, 2))}, "expected three axes of voxels, got 3x4x5x2; split a series"),
    "2-D": ({"voxels": voxels_hu((3, 4))}, "expected three axes of voxels, got 3x4; .*stack slices"),
    "nan": ({"voxels": NAN}, "expected a finite HU in every voxel, got 2 NaN or infinite; replace them"),
    "unit": (
        {"voxels": (voxels_hu() / 2000 + 0.6).astype(np.float32).clip(0, 1)},
        "got values from 0.* to 1, a scaled image",
    ),
    "unsigned": ({"voxels": voxels_hu() + np.int16(1024)}, "look like unsigned CT numbers; subtract 1024"),
    "8 bit": ({"voxels": np.arange(256, dtype=np.uint8).reshape(4, 8, 8)}, "look like 8-bit grey levels"),
    "singular": ({"voxels": voxels_hu(), "affine": SINGULAR}, "affine with three independent axes, got a singular one"),
    "complex": ({"voxels": voxels_hu().astype(np.complex64)}, "expected one number per voxel, got complex64"),
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_bad_scan(tmp_path, case):
    what, words = BAD_SCANS[case]
    if case == "singular":  # nibabel would not write it
        path = save(tmp_path / "bad.nii", what["voxels"])
        content = bytearray(path.read_bytes())
        content[280:328] = np.asarray(SINGULAR[:3], "<f4").tobytes()
        path.write_bytes(content)
    else:
        path = save(tmp_path / "bad.nii", **what)
    with pytest.raises(ValueError, match=f"^bad.nii: .*{words}"):
        read_scan(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_truncated(tmp_path, suffix, keep):
    path = save(tmp_path / f"cut{suffix}", voxels_hu((8, 8, 8)))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match="^cut.nii.*: expected a whole NIfTI file, got a truncated or damaged one"):
        read_scan(path)


def test_damage_inside_gzip_is_noticed(tmp_path):
    path = save(tmp_path / "bent.nii.gz", voxels_hu((8, 8, 8)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bent.nii.gz: .*truncated or damaged"):
        read_scan(path)


def test_not_a_nifti_and_no_file(tmp_path):
    (tmp_path / "text.nii").write_text("liver " * 200)
    with pytest.raises(ValueError, match="^text.nii: expected a NIfTI file, got another format; convert it"):
        read_scan(tmp_path / "text.nii")
    with pytest.raises(ValueError, match="^gone.nii: expected a NIfTI file, got none at .*; check the path"):
        read_scan(tmp_path / "gone.nii")


def test_label_follows_the_scan_even_when_stored_turned(tmp_path, scan):
    mask = (np.asarray(nib.load(scan.path).dataobj) > 0).astype(np.uint8)
    turned = nib.Nifti1Image(mask, affine_of()).as_reoriented(nib.orientations.axcodes2ornt("SLP"))
    turned.to_filename(tmp_path / "label.nii")
    label = read_label(tmp_path / "label.nii", like=scan)
    assert label.dtype == torch.uint8
    assert torch.equal(label.bool(), scan.volume_hu > 0)


def test_bad_label(tmp_path, scan):
    mask = np.ones((3, 4, 5), np.uint8)
    bad = {
        "volume-12.nii: labels are 3x4x4 but the scan is 3x4x5; check the pair": (mask[..., :4], None),
        "m.nii: expected a labelled voxel, got an empty mask; leave this case out": (mask * 0, None),
        "m.nii: expected whole class numbers in 0..255, got 0.5 to 0.5": (mask * np.float32(0.5), None),
        "m.nii: expected labels on the grid of volume-12.nii, got .* 30.0 mm away; check the pair": (
            mask,
            affine_of(origin_mm=(0.0, 12.0, 900.0)),
        ),
    }
    for words, (voxels, affine) in bad.items():
        with pytest.raises(ValueError, match=words):
            read_label(save(tmp_path / "m.nii", voxels, affine), like=scan)


def test_a_low_dose_scan_lies_where_its_partner_lies(tmp_path, scan):
    low = read_low_dose(save(tmp_path / "low.nii", voxels_hu(seed=1)), like=scan)
    assert low.volume_hu.shape == scan.volume_hu.shape
    with pytest.raises(ValueError, match="^volume-12.nii: the low dose is 4x4x3 but the scan is 5x4x3"):
        read_low_dose(save(tmp_path / "low.nii", voxels_hu()[..., :4]), like=scan)
    away = save(tmp_path / "low.nii", voxels_hu(), affine_of(origin_mm=(0.0, 12.0, 900.0)))
    with pytest.raises(ValueError, match="^low.nii: expected a low dose on the grid of volume-12.nii, got .* 30.0 mm"):
        read_low_dose(away, like=scan)


def test_an_empty_mask_passes_only_where_it_may(tmp_path, scan):
    empty = save(tmp_path / "m.nii", np.zeros((3, 4, 5), np.uint8))
    assert not read_label(empty, like=scan, allow_empty=True).any()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "PIL"])
def test_grid_affine_tells_where_a_voxel_of_the_volume_lies(tmp_path, codes):
    scan = read_scan(save(tmp_path / "in.nii", voxels_hu(), affine_of(codes)))
    z, y, x = torch.nonzero(scan.volume_hu == scan.volume_hu.max())[0].tolist()
    stored = np.asarray(nib.load(scan.path).dataobj)
    (index,) = np.argwhere(stored == stored.max())[:1]
    np.testing.assert_allclose(scan.grid_affine @ [z, y, x, 1], affine_of(codes) @ [*index, 1])


def test_a_folder_is_read_as_a_dicom_series(tmp_path, monkeypatch):
    from examples.tod_net_ct.scans import read

    monkeypatch.setattr(read, "read_series", lambda folder, assume_hu: f"the series in {folder.name}")
    (tmp_path / "series").mkdir()
    assert read_scan(tmp_path / "series") == "the series in series"


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")])
def test_a_full_disk_is_one_sentence_whatever_the_writer_made_of_it(tmp_path, kind):
    def write(path):
        path.write_bytes(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise kind  # noqa: B904  (as torch.save does)

    with (
        pytest.raises(OSError, match="a.pt: expected room on the disk, got a full one; free some space") as caught,
        replacing(tmp_path / "a.pt") as unfinished,
    ):
        write(unfinished)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.skipif("TASKLOSS_CT_DATA" not in os.environ, reason="TASKLOSS_CT_DATA names no folder of real CT")
@pytest.mark.parametrize("layout", ["lits", "kits"])
def test_real_cases_come_back_bit_for_bit(tmp_path, layout):
    (case,) = find_cases(Path(os.environ["TASKLOSS_CT_DATA"]) / layout)
    scan_path, label_path = case.scan, case.label
    scan = read_scan(scan_path)
    label = read_label(label_path, like=scan)
    assert label.shape == scan.volume_hu.shape
    assert -100 < float(scan.volume_hu[label > 0].median()) < 200  # soft tissue lies under the label
    write_scan(tmp_path / "out.nii", scan.volume_hu, scan)
    stored, written = nib.load(scan_path), nib.load(tmp_path / "out.nii")
    assert np.array_equal(np.asarray(stored.dataobj), np.asarray(written.dataobj))
    assert stored.header == written.header
