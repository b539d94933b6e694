"""Cases from any source, brought onto the training grid and cut in sub-volumes, one at a time."""

from __future__ import annotations

import gc
import json
import os
import pickle
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from examples.tod_net_ct.dose import degrade as simulate
from examples.tod_net_ct.dose import to_unit
from examples.tod_net_ct.run import Settings, load_tensors, save_tensors, write_text
from examples.tod_net_ct.scans import Cases, cases_of, prepare
from examples.tod_net_ct.scans import preparation as stage
from examples.tod_net_ct.scans.grid import Grid, is_on_grid, resample, sub_volume_starts, training_grid

nib = pytest.importorskip("nibabel")

PHANTOMS = Settings(n_train=2, n_validation=1, n_test=1, shape=(8, 16, 16), voxel_mm=(12.0, 24.0, 24.0))
SCANS = replace(PHANTOMS, shape=(4, 16, 12), voxel_mm=(2.0, 3.0, 3.0))
GRADIENT_HU_PER_MM = np.array([1.0, 2.0, 3.0])  # along the patient's left, back and head: LPS


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


def degrade(run: Path, shift_hu: int = 7) -> None:
    """In the place of a simulation, which these tests are not about."""
    for path in (run / "cases").glob("*.pt"):
        save_tensors(run / "low_dose" / path.name, low_hu=load_tensors(path)["normal_hu"] + shift_hu)
    write_text(run / "low_dose" / "manifest.json", json.dumps({"facts": {"shift_hu": shift_hu}, "results": {}}))


def affine_of(codes="LPS", voxel_mm=(0.8, 0.8, 3.0), origin_mm=(-20.0, -30.0, 40.0)):
    """From (column, row, slice) to NIfTI's RAS, the first voxel of an LPS volume at the origin."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.vstack([np.column_stack([np.diag(voxel_mm), origin_mm]), [0, 0, 0, 1]])


def ramp(shape=(40, 50, 12), affine=None):
    """A NIfTI image whose HU are a linear function of the position: linear resampling must return it exactly."""
    affine = affine_of() if affine is None else affine
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    lps_mm = (index @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    return nib.Nifti1Image((lps_mm @ GRADIENT_HU_PER_MM - 100).round().astype(np.int16), affine)


def mask_of(image, label=1):
    mask = np.zeros(image.shape, np.uint8)
    mask[10:30, 10:40, 3:9] = label
    return nib.Nifti1Image(mask, image.affine)


def turned(image, codes):
    target = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(image.affine), target))


def write_lits(folder: Path, n: int = 3, codes=("LPS",), **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image = ramp(**options)
        turned(image, codes[i % len(codes)]).to_filename(folder / f"volume-{i}.nii")
        turned(mask_of(image), codes[i % len(codes)]).to_filename(folder / f"segmentation-{i}.nii")
    return folder


def scans(folder: Path, **options) -> Settings:
    return replace(SCANS, data=str(folder), n_train=1) if not options else replace(SCANS, data=str(folder), **options)


def manifest(run: Path) -> dict:
    return json.loads((run / "cases" / "manifest.json").read_text())


def test_phantoms_of_a_noisy_normal_dose_are_scanned_at_it(tmp_path) -> None:
    noisy = replace(PHANTOMS, i0_photons=1e6, electronic_noise_photons=0.0, dose_fraction=0.1, n_views=60)
    clean, first, again = (prepare(s, tmp_path / str(i)) for i, s in enumerate((PHANTOMS, noisy, noisy)))
    name = cases_of(clean, "train")[0].name
    quiet, scanned, same = (load_tensors(folder / name)["normal_hu"].float() for folder in (clean, first, again))
    inside = quiet.abs() < 300
    noise_hu = (scanned - quiet)[inside]
    assert torch.equal(scanned, same) and 1 < noise_hu.std() < 60 and abs(noise_hu.mean()) < noise_hu.std()
    low_hu = load_tensors(simulate(noisy, tmp_path / "1") / name)["low_hu"].float()
    ratio = (low_hu - quiet)[inside].std() / noise_hu.std()
    assert 10**0.5 * 0.85 < ratio < 10**0.5 * 1.25, "a tenth of the photons, so about sqrt(10) times the noise"
    with pytest.raises(ValueError, match=r"kernel: expected one of ramp, .*, got 'foo'; try --set kernel=hann"):
        prepare(replace(noisy, kernel="foo"), tmp_path / "3")
    assert not (tmp_path / "3").exists(), "told before any work"
    other = prepare(replace(noisy, i0_photons=5e5), tmp_path / "1")
    assert not torch.equal(load_tensors(other / name)["normal_hu"].float(), scanned), "its dose decides a case"


def test_phantoms_come_as_they_were_made_and_take_no_second_place_on_disk(tmp_path) -> None:
    prepare(PHANTOMS, tmp_path)
    degrade(tmp_path)
    cases = Cases(tmp_path, "train")
    assert len(cases) == len(cases.paths) == 2
    for i in range(2):
        stored = load_tensors(cases.paths[i])
        low, normal, mask = cases[i]
        assert torch.equal(normal, to_unit(stored["normal_hu"].float())[None]) and normal.shape == (1, 8, 16, 16)
        assert torch.equal(low, to_unit(stored["normal_hu"].float() + 7)[None])
        assert torch.equal(mask, stored["mask"][None]) and mask.dtype == torch.uint8 and mask.any()
        normal_hu, low_hu, _ = cases.in_hu(i)
        assert torch.equal(normal_hu + 7, low_hu) and normal_hu.dtype == torch.float32
    assert not (tmp_path / "grid").exists()
    assert stored["voxel_mm"].tolist() == [12.0, 24.0, 24.0]


def test_the_manifest_tells_where_every_case_is_from(tmp_path) -> None:
    data = write_lits(tmp_path / "data")
    prepare(scans(data), tmp_path / "run")
    cases = manifest(tmp_path / "run")["results"]["cases"]
    assert sorted(cases) == ["test-000", "train-000", "validation-000"]
    assert {about["patient"] for about in cases.values()} == {"volume-0", "volume-1", "volume-2"}
    about = cases["train-000"]
    assert about["shape"] == [12, 50, 40] and about["voxel_mm"] == [3.0, 0.8, 0.8]
    assert len(about["digests"]) == 2 and about["origin"] == about["patient"]
    assert manifest(tmp_path / "run")["results"]["warning"] == ""


def test_scans_are_kept_whole_on_their_own_grid(tmp_path) -> None:
    data = write_lits(tmp_path / "data", codes=("LPS", "RAI", "SRA"))
    prepare(scans(data), tmp_path / "run")
    degrade(tmp_path / "run")
    for split in ("validation", "test"):
        cases = Cases(tmp_path / "run", split)
        low, normal, mask = cases[0]
        assert len(cases) == 1 and normal.shape == low.shape == mask.shape == (1, 12, 50, 40)
        expected = torch.from_numpy(np.asarray(ramp().dataobj).transpose(2, 1, 0).astype(np.float32))
        assert torch.equal(cases.in_hu(0)[0], expected), "whatever way round the file was stored"
        assert torch.equal(normal, to_unit(expected)[None])


def scan_grid(tilt_mm=0.0) -> Grid:
    """The grid of `ramp` in mm towards head, back and left."""
    return Grid(np.array([[3.0, 0, 0, 40], [tilt_mm, 0.8, 0, -30], [0, 0, 0.8, -20], [0, 0, 0, 1]]), (12, 50, 40))


def check_ramp(item, scan: Grid, grid: Grid, start: int) -> None:
    """Every voxel between the centres of the scan's outermost voxels has the HU of its position."""
    low, normal, _ = (tensor[0].double() for tensor in item)
    index = np.stack(np.meshgrid(*map(np.arange, normal.shape), [1], indexing="ij"), -1)[..., 0, :] + [start, 0, 0, 0]
    zyx_mm = index @ grid.affine.T
    in_scan = (zyx_mm @ np.linalg.inv(scan.affine).T)[..., :3]
    inside = ((in_scan > -1e-6) & (in_scan < np.array(scan.shape) - 1 + 1e-6)).all(-1)
    expected_hu = torch.from_numpy(zyx_mm[..., 2::-1] @ GRADIENT_HU_PER_MM - 100)
    seen = torch.from_numpy(inside) & (expected_hu.abs() < 190)
    assert seen.double().mean() > 0.2
    torch.testing.assert_close((normal * 400 - 200)[seen], expected_hu[seen], atol=1.01, rtol=0)  # rounded twice
    torch.testing.assert_close(((low - normal) * 400)[seen], torch.full_like(low, 7)[seen], atol=1.01, rtol=0)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SRA", "PIL"])
def test_training_items_lie_where_they_should_in_space(tmp_path, codes) -> None:
    prepare(scans(write_lits(tmp_path / "data", codes=(codes,))), tmp_path / "run")
    degrade(tmp_path / "run")
    cases = Cases(tmp_path / "run", "train")
    # 12 slices of 3 mm are 18 of 2 mm: sub-volumes of 4 that overlap by half, the last flush with the end
    assert [start for _, start in cases.items] == [0, 2, 4, 6, 8, 10, 12, 14]
    grid = training_grid(scan_grid(), SCANS.voxel_mm, SCANS.shape[1:])
    np.testing.assert_allclose(grid.affine[:3, 3], [39.5, -32.9, -20.9])  # centres agree
    for i, (_, start) in enumerate(cases.items):
        check_ramp(cases[i], scan_grid(), grid, start)
    # the mask is 6 slices of 3 mm, 30 rows and 20 columns of 0.8 mm
    whole = load_tensors(next((tmp_path / "run" / "grid").glob("*/*.pt")))
    voxels = whole["mask"].nonzero().double().numpy()
    assert len(voxels) * 2 * 3 * 3 == pytest.approx(6 * 3 * 30 * 0.8 * 20 * 0.8, rel=0.15)
    centre_mm = grid.affine[:3, :3] @ voxels.mean(0) + grid.affine[:3, 3]
    drawn_mm = scan_grid().affine @ [5.5, 24.5, 19.5, 1]
    assert np.abs(centre_mm - drawn_mm[:3]).max() < 1.01
    assert set(whole["mask"].unique().tolist()) == {0, 1}
    assert torch.all(whole["normal_hu"][:, 0, :] == -1024), "40 mm of scan in 48 mm of grid: air around it"


def test_a_tilted_gantry_is_set_upright(tmp_path) -> None:
    affine = affine_of()
    affine[1, 2] = 1.5  # each slice 1.5 mm further to the front
    settings = scans(write_lits(tmp_path / "data", affine=affine), shape=(4, 16, 12), n_train=1)
    prepare(settings, tmp_path / "run")
    degrade(tmp_path / "run")
    grid = training_grid(scan_grid(tilt_mm=-1.5), settings.voxel_mm, settings.shape[1:])
    np.testing.assert_allclose(grid.affine[:3, :3], np.diag(settings.voxel_mm), atol=1e-12)
    cases = Cases(tmp_path / "run", "train")
    for i, (_, start) in enumerate(cases.items):
        check_ramp(cases[i], scan_grid(tilt_mm=-1.5), grid, start)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_resampling_is_monais(tilt) -> None:
    monai_data = pytest.importorskip("monai.data")
    from monai.transforms import SpatialResample

    affine = np.array([[4, tilt, 0, 7], [-tilt, 0.8, 0, 3], [0, 0, 0.7, 1], [0, 0, 0, 1.0]])
    source = Grid(affine, (9, 30, 32))
    target = training_grid(source, (2.0, 1.5, 1.5), (20, 24))
    volume = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    ours = resample(volume, source, target, fill=-1024)
    sample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float64)
    image = monai_data.MetaTensor(volume[None], affine=torch.from_numpy(affine))
    theirs = sample(image, dst_affine=torch.from_numpy(target.affine), spatial_size=target.shape).as_tensor()[0]
    inside = ours > -1000
    assert 0.2 < inside.float().mean() < 0.9
    torch.testing.assert_close(ours[inside], theirs[inside].float(), atol=1e-5, rtol=0)


def test_there_and_back_again() -> None:
    source = Grid(np.diag([3.0, 0.8, 0.8, 1.0]), (12, 40, 40))
    target = training_grid(source, (1.5, 0.8, 0.8), (40, 40))
    mask = torch.zeros(source.shape, dtype=torch.uint8)
    mask[3:9, 10:20, 10:30] = 1
    there = resample(mask, source, target, fill=0, nearest=True)
    assert torch.equal(resample(there, target, source, fill=0, nearest=True), mask)


def test_a_scan_with_the_right_voxels_is_cropped_without_resampling(tmp_path) -> None:
    affine = affine_of(voxel_mm=(3.0, 3.0, 2.0))
    settings = scans(write_lits(tmp_path / "data", affine=affine), shape=(4, 60, 12), n_train=1)
    prepare(settings, tmp_path / "run")
    degrade(tmp_path / "run")
    cases = Cases(tmp_path / "run", "train")
    _, normal, mask = cases[1]
    expected = torch.from_numpy(np.asarray(ramp(affine=affine).dataobj).transpose(2, 1, 0).astype(np.float32))
    assert normal.shape == mask.shape == (1, 4, 60, 12)
    assert torch.equal(normal[0, :, 5:55], to_unit(expected[2:6, :, 14:26])), "centre columns, sub-volume from slice 2"
    assert not normal[0, :, :5].any() and not normal[0, :, 55:].any(), "rows of air"
    assert not (tmp_path / "run" / "grid").exists()
    assert not is_on_grid(Grid(np.diag([2.0, 3.0, 3.1, 1.0]), (1, 1, 1)), settings.voxel_mm)


def test_a_scan_shorter_than_a_sub_volume_is_filled_up_with_air(tmp_path) -> None:
    affine = affine_of(voxel_mm=(3.0, 3.0, 2.0))
    prepare(scans(write_lits(tmp_path / "data", affine=affine), shape=(20, 50, 40), n_train=1), tmp_path / "run")
    degrade(tmp_path / "run")
    cases = Cases(tmp_path / "run", "train")
    _, normal, _ = cases[0]
    assert len(cases) == 1 and normal.shape == (1, 20, 50, 40)
    assert not normal[0, :4].any() and not normal[0, 16:].any() and normal[0, 4:16].any()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("n_slices", [1, 31, 32, 33, 100, 450])
def test_sub_volumes_cover_every_slice(n_slices, overlap) -> None:
    starts = sub_volume_starts(n_slices, 32, overlap)
    covered = {z for start in starts for z in range(start, start + 32)}
    assert covered >= set(range(n_slices))
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert starts[-1] + 32 == max(32, n_slices), "the last is flush with the end"
    assert all(b - a <= round(32 * (1 - overlap)) for a, b in zip(starts, starts[1:], strict=False))


def test_an_overlap_of_one_would_never_end(tmp_path) -> None:
    with pytest.raises(ValueError, match="^overlap: expected a share from 0 to below 1, got 1.0; --set overlap=0.5"):
        prepare(replace(PHANTOMS, overlap=1.0), tmp_path)


def test_a_resampled_case_is_written_once_and_never_stale(tmp_path) -> None:
    run = tmp_path / "run"
    prepare(scans(write_lits(tmp_path / "data")), run)
    degrade(run)
    before = Cases(run, "train")[0]
    (kept,) = (run / "grid").glob("*/*.pt")
    stamp = kept.stat().st_mtime_ns
    assert all(torch.equal(a, b) for a, b in zip(before, Cases(run, "train")[0], strict=True))
    assert kept.stat().st_mtime_ns == stamp
    degrade(run, shift_hu=50)
    low, normal, _ = Cases(run, "train")[0]
    assert torch.equal(normal, before[1]) and not torch.equal(low, before[0])
    assert len(list((run / "grid").glob("*/*.pt"))) == 1 and not kept.exists(), "the old one would only take room"


def test_a_damaged_resampled_case_is_made_again(tmp_path) -> None:
    run = tmp_path / "run"
    prepare(scans(write_lits(tmp_path / "data")), run)
    degrade(run)
    before = Cases(run, "train")[0]
    (kept,) = (run / "grid").glob("*/*.pt")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 0x40
    kept.write_bytes(content)
    assert all(torch.equal(a, b) for a, b in zip(before, Cases(run, "train")[0], strict=True))
    assert kept.read_bytes() != bytes(content)


def test_workers_share_the_cache_and_give_what_one_process_gives(tmp_path) -> None:
    prepare(scans(write_lits(tmp_path / "data")), tmp_path / "run")
    degrade(tmp_path / "run")
    cases = pickle.loads(pickle.dumps(Cases(tmp_path / "run", "train")))
    several = list(DataLoader(cases, batch_size=2, num_workers=2))  # both meet at a case that is not there yet
    assert len(list((tmp_path / "run" / "grid").glob("*/*"))) == 1, "no unfinished file is left"
    alone = list(DataLoader(cases, batch_size=2))
    assert all(torch.equal(a, b) for x, y in zip(several, alone, strict=True) for a, b in zip(x, y, strict=True))
    assert several[0][0].shape == (2, 1, *SCANS.shape)


def test_training_memory_does_not_grow_with_the_volumes(tmp_path) -> None:
    peak = Path("/proc/self/clear_refs")
    if not os.access(peak, os.W_OK):
        pytest.skip("peak memory is reset through Linux's /proc")
    shape, n = (256, 128, 128), 24
    about = {"training_slices": shape[0], "on_training_grid": True}
    volume = torch.randint(-200, 200, shape, dtype=torch.int16)
    mask = torch.ones(shape, dtype=torch.uint8)
    for folder, tensors in (("cases", {"normal_hu": volume, "mask": mask}), ("low_dose", {"low_hu": volume})):
        save_tensors(tmp_path / folder / "train-000.pt", **tensors)
        for i in range(1, n):
            os.link(tmp_path / folder / "train-000.pt", tmp_path / folder / f"train-{i:03d}.pt")
    facts = {"shape": (8, 128, 128), "voxel_mm": (1, 1, 1), "overlap": 0, "organ": "liver"}
    results = {"cases": {f"train-{i:03d}": about for i in range(n)}}
    write_text(tmp_path / "cases" / "manifest.json", json.dumps({"facts": facts, "results": results}))
    del volume, mask

    def peak_mib() -> float:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    cases = Cases(tmp_path, "train")
    assert len(cases) == n * 32
    cases[0]
    gc.collect()
    peak.write_text("5")
    before = peak_mib()
    for i in range(0, len(cases), 32):
        cases[i + 5]
    assert peak_mib() - before < 8, "24 volumes of 20 MiB; an item has 1.1 MiB"


def test_scans_are_prepared_one_at_a_time(tmp_path, monkeypatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def watched(path, read=stage.read_scan, **how):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        scan = read(path, **how)
        alive.append(weakref.ref(scan.volume_hu))
        return scan

    monkeypatch.setattr(stage, "read_scan", watched)
    prepare(scans(write_lits(tmp_path / "data", n=5), n_train=3), tmp_path / "run")
    assert len(alive) == 5 and most == 0, "a scan was still in memory when the next was read"


def test_a_killed_prepare_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    settings, save, written = scans(write_lits(tmp_path / "data")), stage.save_tensors, []

    def killed_at_the_second(path, **tensors):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        save(path, **tensors)

    monkeypatch.setattr(stage, "save_tensors", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings, tmp_path / "run")
    monkeypatch.setattr(stage, "save_tensors", lambda path, **t: (written.append(path.name), save(path, **t)))
    prepare(settings, tmp_path / "run")
    assert written == ["train-000.pt", "validation-000.pt", "test-000.pt"]
    assert len(manifest(tmp_path / "run")["results"]["cases"]) == 3


def test_a_scan_that_changed_is_read_anew(tmp_path) -> None:
    settings = scans(write_lits(tmp_path / "data"))
    prepare(settings, tmp_path / "run")
    first = (tmp_path / "run" / "cases" / "manifest.json").read_text()
    prepare(settings, tmp_path / "run")
    assert (tmp_path / "run" / "cases" / "manifest.json").read_text() == first
    image = ramp()
    nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(1), image.affine).to_filename(tmp_path / "data/volume-0.nii")
    prepare(settings, tmp_path / "run")
    assert (tmp_path / "run" / "cases" / "manifest.json").read_text() != first


def test_the_organs_own_labels_make_the_mask(tmp_path) -> None:
    data = write_lits(tmp_path / "data")
    labels = np.asarray(mask_of(ramp()).dataobj).copy()
    labels[12:14, 12:14, 4] = 2  # a tumour in the liver
    labels[0, 0, 0] = 3  # what LiTS does not say
    for i in range(3):
        nib.Nifti1Image(labels, ramp().affine).to_filename(data / f"segmentation-{i}.nii")
    sums = {}
    for organ in ("liver", "tumour", "1", "2,3"):
        prepare(replace(scans(data), organ=organ), tmp_path / organ)
        sums[organ] = int(load_tensors(tmp_path / organ / "cases" / "test-000.pt")["mask"].sum())
    n = 20 * 30 * 6
    assert sums == {"liver": n, "tumour": 4, "1": n - 4, "2,3": 5}


def test_one_body_in_every_layout_is_one_case(tmp_path) -> None:
    image, mask = ramp(), mask_of(ramp())
    pairs = {
        "lits": ("volume-{}.nii.gz", "segmentation-{}.nii"),
        "kits": ("case_{}/imaging.nii.gz", "case_{}/segmentation.nii.gz"),
        "decathlon": ("imagesTr/liver_{}.nii.gz", "labelsTr/liver_{}.nii.gz"),
        "pairs": ("p{}.nii.gz", "p{}_mask.nii.gz"),
        "folders": ("scans/p{}.nii", "masks/p{}.nii"),
        "case folders": ("p{}/scan.nii", "p{}/mask.nii"),
    }
    found = {}
    for layout, names in pairs.items():
        for i in range(3):
            for name, content in zip(names, (image, mask), strict=True):
                path = tmp_path / layout / name.format(i)
                path.parent.mkdir(parents=True, exist_ok=True)
                content.to_filename(path)
        organ = "kidney" if layout == "kits" else "liver"
        prepare(replace(scans(tmp_path / layout), organ=organ), tmp_path / "runs" / layout)
        found[layout] = load_tensors(cases_of(tmp_path / "runs" / layout / "cases", "test")[0])
    for case in found.values():
        assert case.keys() == {"normal_hu", "mask", "voxel_mm", "affine"}
        assert all(torch.equal(case[key], found["lits"][key]) for key in case)


@pytest.mark.filterwarnings("ignore:.*passed over what is no case")  # a folder of another layout beside
@pytest.mark.parametrize("style", ["a folder per series", "slices beside the mask", "dose pairs"])
def test_a_dicom_series_is_the_same_case_as_its_nifti(tmp_path, style) -> None:
    pytest.importorskip("pydicom")
    from tests.tod_net_ct.scans.test_dicom import as_nifti, hu_at, series_of

    mask = np.zeros(hu_at().shape, np.uint8)
    mask[1:3, 1:3, 2:4] = 1
    for i in range(3):
        as_nifti(tmp_path / f"volume-{i}.nii.gz", hu_at())
        as_nifti(tmp_path / f"segmentation-{i}.nii.gz", mask)
        case = tmp_path / "dicom" / f"p{i}"
        if style == "dose pairs":
            series_of(tmp_path / "dicom" / "normal" / f"p{i}")
            series_of(tmp_path / "dicom" / "low" / f"p{i}", hu=hu_at(seed=1))
        else:
            series_of(case / "scan" if style == "a folder per series" else case)
            as_nifti(case / "mask.nii.gz", mask)
    prepare(scans(tmp_path), tmp_path / "a")
    prepare(scans(tmp_path / "dicom"), tmp_path / "b")
    nifti, dicom = (load_tensors(tmp_path / run / "cases" / "train-000.pt") for run in ("a", "b"))
    assert torch.equal(nifti["normal_hu"], dicom["normal_hu"])
    torch.testing.assert_close(nifti["affine"], dicom["affine"], atol=1e-4, rtol=0)
    if style == "dose pairs":
        assert not dicom["mask"].any() and not torch.equal(dicom["low_hu"], dicom["normal_hu"])
    else:
        assert torch.equal(nifti["mask"], dicom["mask"]) and dicom["mask"].sum() == 8


def write_dose_pairs(folder: Path, patients=("L1", "L2", "L3")) -> Path:
    folder.mkdir()
    for patient in patients:
        for i in range(2):
            image = ramp((40, 50, 1))
            image.to_filename(folder / f"{patient}_{i}_full.nii.gz")
            noisy = np.asarray(image.dataobj) + np.int16(30)
            nib.Nifti1Image(noisy, image.affine).to_filename(folder / f"{patient}_{i}_quarter.nii.gz")
    return folder


def test_real_dose_pairs_bring_their_own_low_dose_and_need_no_mask(tmp_path) -> None:
    prepare(scans(write_dose_pairs(tmp_path / "data")), tmp_path / "run")
    assert not (tmp_path / "run" / "low_dose").exists(), "nothing was simulated"
    cases = Cases(tmp_path / "run", "test")
    normal_hu, low_hu, mask = cases.in_hu(1)
    assert len(cases) == 2 and torch.equal(low_hu, normal_hu + 30) and not mask.any()
    about = manifest(tmp_path / "run")["results"]["cases"]
    assert len({about[f"test-00{i}"]["patient"] for i in range(2)}) == 1, "both slices of a patient"
    low, normal, mask = Cases(tmp_path / "run", "train")[0]
    assert low.shape == normal.shape == mask.shape == (1, *SCANS.shape) and (low > normal).any()


def test_a_patient_who_serves_twice_is_told_in_the_manifest(tmp_path) -> None:
    data = write_lits(tmp_path / "data", n=1)
    prepare(scans(data, n_train=1, reuse=True), tmp_path / "run")
    results = manifest(tmp_path / "run")["results"]
    assert results["warning"] == "for trying out only: volume-0 served in more than one split"
    assert sorted(results["cases"]) == ["test-000", "train-000", "validation-000"]


@pytest.mark.skipif("TASKLOSS_CT_DATA" not in os.environ, reason="TASKLOSS_CT_DATA names no folder of real CT")
@pytest.mark.parametrize(("layout", "organ"), [("lits", "liver"), ("kits", "kidney"), ("paired", "liver")])
def test_real_scans_become_training_items(tmp_path, layout, organ) -> None:
    settings = scans(Path(os.environ["TASKLOSS_CT_DATA"]) / layout, n_train=1, reuse=True, organ=organ)
    settings = replace(settings, shape=(16, 64, 64), voxel_mm=(3.0, 4.0, 4.0))
    prepare(settings, tmp_path)
    degrade(tmp_path)
    low, normal, mask = Cases(tmp_path, "train")[0]
    assert low.shape == normal.shape == mask.shape == (1, 16, 64, 64)
    assert 0.02 < float(normal.mean()) < 0.98
