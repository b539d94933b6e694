"""The study's denoisers on real scans: before and after they are trained further on another patient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("lightning_fabric")
pytest.importorskip("nibabel")

import nibabel

from examples.tod_net_ct.inference import segment
from examples.tod_net_ct.metrics import dice, image_quality
from examples.tod_net_ct.run import PRESETS
from examples.tod_net_ct.scans import Cases
from examples.tod_net_ct.study import real
from examples.tod_net_ct.study.seeds import make_ready
from examples.tod_net_ct.training import load_task, restorer, train_denoiser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAMES = ("mse_wgan", "sa_wgan", "cnn_mse")
TINY = replace(
    PRESETS["smoke"], shape=(16, 32, 32), voxel_mm=(6.0, 12.0, 12.0), n_train=2, n_validation=1, n_test=1,
    task_networks=("unet",), task_steps=(1,), task_batch=1, steps=1, validate_every=1, accelerator="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A study's folder with denoisers that have seen phantoms alone."""
    output = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKLOSS_QUIET", "1")
        make_ready(TINY, output / "seed-0", TINY.task_networks)
        for name in NAMES:
            train_denoiser(name, TINY, output / "seed-0")
    return output


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    monkeypatch.setattr(real, "FINE_TUNING_STEPS", 1)
    monkeypatch.setattr(real, "FINE_TUNING_SHAPE", (1, 32, 32))
    monkeypatch.setattr(real, "DOSE", ())


def write(path: Path, volume: np.ndarray, voxel_mm: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.int16), np.diag([*voxel_mm, 1.0])), path)


def test_pairs_of_two_patients_before_and_after_fine_tuning_on_the_other(output, tmp_path) -> None:
    generator = np.random.default_rng(0)
    for name in ("P1_a", "P1_b", "P2_a"):
        full = generator.normal(40, 20, (24, 20, 1))
        write(tmp_path / "pairs" / f"{name}_full.nii.gz", full)
        write(tmp_path / "pairs" / f"{name}_quarter.nii.gz", full + generator.normal(0, 30, full.shape))
    real.real_pairs(TINY, NAMES, tmp_path / "pairs", output, tmp_path)
    found = {patient: json.loads((tmp_path / "pairs" / f"{patient}.json").read_text()) for patient in ("P1", "P2")}
    expected = {"none", *NAMES, *(n + real.FINE_TUNED for n in NAMES), real.SCRATCH}
    assert set(found["P1"]) == set(found["P2"]) == expected
    assert (found["P1"]["none"]["whole_rmse_hu"]["n"], found["P2"]["none"]["whole_rmse_hu"]["n"]) == (2, 1)
    # Trained on the other patient: the folder of the run that tests P1 holds P2's slice in training, and not P1's.
    manifest = json.loads((output / "real-P2" / "mse_wgan" / "cases" / "manifest.json").read_text())
    cases = manifest["results"]["cases"].items()
    assert {about["patient"] for name, about in cases if name.startswith("train")} == {"P2"}
    # One step from the phantoms' weights, not from new ones.
    before, after, new = (
        restore(torch.zeros(1, 24, 20) + 30)
        for restore in (
            restorer("mse_wgan", TINY, output / "seed-0"),
            restorer("mse", TINY, output / "real-P2" / "mse_wgan"),
            restorer("mse", TINY, output / "real-P2" / real.SCRATCH),
        )
    )
    assert 0 < float((after - before).abs().mean()) < float((new - before).abs().mean())


def test_scans_are_judged_at_both_doses_through_every_denoiser(output, tmp_path) -> None:
    body = np.full((24, 24, 8), 40.0)
    body[:2] = -1000  # air, without which this would look like no CT
    organ = np.zeros_like(body)
    organ[6:16, 6:16, 2:6] = 1
    write(tmp_path / "lits" / "volume-7.nii.gz", body + 30 * organ, (12.0, 12.0, 12.0))
    write(tmp_path / "lits" / "segmentation-7.nii.gz", organ, (12.0, 12.0, 12.0))
    rows = real.real_scans(TINY, NAMES, tmp_path / "lits", output)
    assert [(r["dose"], r["denoiser"]) for r in rows] == [(d, n) for d in ("low", "normal") for n in ("none", *NAMES)]
    assert {r["case"] for r in rows} == {"volume-7"}
    # Each row is what its own denoiser makes of its own dose, judged by the run's network: worked out again here.
    cases = Cases(output / "real-scans", "test")
    normal_hu, low_hu, mask = cases.in_hu(0)
    assert not torch.equal(normal_hu, low_hu)
    judge, voxel_mm = load_task(TINY, output / "seed-0"), cases.voxel_mm_of(0)
    for row in rows:
        image = low_hu if row["dose"] == "low" else normal_hu
        if row["denoiser"] != "none":
            image = restorer(row["denoiser"], TINY, output / "seed-0")(image)
        label = segment(judge, image, voxel_mm, TINY.voxel_mm)
        assert row["unet_dice"] == pytest.approx(100 * dice(label, mask), abs=0.5)  # memory layouts round apart
        if (row["dose"], row["denoiser"]) != ("normal", "none"):
            assert row["roi_rmse_hu"] == pytest.approx(image_quality(image, normal_hu, mask)["roi_rmse_hu"], rel=1e-5)
    errors = [row["whole_rmse_hu"] for row in rows if row["dose"] == "low"]
    assert len(set(errors)) == len(errors) == 1 + len(NAMES), "no two denoisers do the same"


def test_pairs_of_one_patient_alone_are_refused(output, tmp_path) -> None:
    for role in ("full", "quarter"):
        write(tmp_path / "pairs" / f"P1_a_{role}.nii.gz", np.zeros((8, 8, 1)))
    with pytest.raises(ValueError, match=r"pairs: expected pairs of two patients, .* got \['P1'\]"):
        real.real_pairs(TINY, NAMES, tmp_path / "pairs", output, tmp_path)
