"""Scans on coarser voxels: means over a voxel's extent, whole patients, and nothing made twice."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("nibabel")

import nibabel

from examples.tod_net_ct.scans import coarser_copy, find_cases, read_label, read_scan
from examples.tod_net_ct.scans.coarser import mean_over_voxels


def test_a_coarser_voxel_is_the_mean_of_what_it_covers():
    volume = np.arange(24.0).reshape(2, 3, 4)
    assert np.allclose(mean_over_voxels(volume, (1, 1, 1), (2, 1, 2))[0, :, 0], [6.5, 10.5, 14.5])
    # one and a half voxels, centred: half of 0 and 1; 2 and half of 3
    assert np.allclose(mean_over_voxels(volume[:1, :1], (1, 1, 1), (1, 1, 1.5))[0, 0], [1 / 1.5, 3.5 / 1.5])


def test_noise_falls_with_the_root_of_the_voxels_and_a_mean_stays():
    noise = np.random.default_rng(0).normal(40, 20, (8, 60, 60))
    found = mean_over_voxels(noise, (1, 1, 1), (2, 2, 2))
    assert found.shape == (4, 30, 30)
    assert found.std() == pytest.approx(20 / 8**0.5, rel=0.05) and found.mean() == pytest.approx(noise.mean())


def test_a_finer_voxel_lies_between_its_neighbours():
    ramp = np.arange(5.0)[None, None]
    assert np.allclose(mean_over_voxels(ramp, (1, 1, 2), (1, 1, 1))[0, 0, 1:-1], np.arange(0.25, 4, 0.5)[:8])


@pytest.fixture
def scans(tmp_path):
    """Two scans of a warm box in air, with an organ of two labels, 2 mm voxels."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in (3, 4):
        volume = np.full((60, 60, 8), -1000, np.int16)
        volume[10:50, 12:52] = 50
        label = np.zeros((60, 60, 8), np.uint8)
        label[20:40, 20:40, 2:6] = 1
        label[20:26, 20:26, 2:6] = 2
        for name, values in (("volume", volume), ("segmentation", label)):
            affine = np.diag([-2.0, -2.0, 2.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}-{number}.nii")
    return folder


def test_a_copy_is_cropped_to_the_body_averaged_and_knows_its_patients(scans, tmp_path):
    folder = coarser_copy(scans, tmp_path / "coarse", (4.0, 4.0, 4.0), {"one": ["volume-3", "volume-4"]})
    cases = find_cases(folder)
    assert [(case.name, case.patient) for case in cases] == [("volume-3", "one"), ("volume-4", "one")]
    scan = read_scan(cases[0].scan)
    label = read_label(cases[0].label, scan)
    assert scan.voxel_mm == (4.0, 4.0, 4.0) and tuple(scan.volume_hu.shape) == (4, 24, 24)  # 40 voxels and 2 x 4 of air
    assert float(scan.volume_hu[:, 4:20, 4:20].min()) == 50
    assert [int((label == i).sum()) for i in (1, 2)] == [2 * (100 - 9), 2 * 9]


def test_none_leaves_the_scans_as_they_are(scans, tmp_path):
    folder = coarser_copy(scans, tmp_path / "same", None, {"a": ["volume-3"], "b": ["volume-4"]})
    assert [case.patient for case in find_cases(folder)] == ["a", "b"]
    assert (folder / "volume-3.nii").resolve() == (scans / "volume-3.nii").resolve()


def test_what_is_there_is_not_made_again(scans, tmp_path):
    patients = {"one": ["volume-3", "volume-4"]}
    folder = coarser_copy(scans, tmp_path / "coarse", (4.0, 4.0, 4.0), patients)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    coarser_copy(scans, folder, (4.0, 4.0, 4.0), patients)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")} and len(before) == 4


def test_a_case_of_no_patient_is_refused(scans, tmp_path):
    with pytest.raises(ValueError, match="expected every case under one patient, got volume-4 in one list alone"):
        coarser_copy(scans, tmp_path / "coarse", (4.0, 4.0, 4.0), {"one": ["volume-3"]})


def test_a_case_that_is_left_out_is_not_copied(scans, tmp_path):
    folder = coarser_copy(scans, tmp_path / "coarse", (4.0, 4.0, 4.0), {"one": ["volume-3"]}, ["volume-4"])
    assert [case.name for case in find_cases(folder)] == ["volume-3"]


def test_a_case_that_is_left_out_must_be_there(scans, tmp_path):
    with pytest.raises(ValueError, match="expected left_out to name its cases, got volume-99; take them out of it"):
        coarser_copy(scans, tmp_path / "coarse", None, {"one": ["volume-3", "volume-4"]}, ["volume-99"])
