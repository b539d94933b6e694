"""Every patient is tested once, nothing is measured twice, and an experiment's file is refused where it is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("lightning_fabric")
pytest.importorskip("nibabel")

import nibabel

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.scans import abdominal_phantom, organ_mask
from examples.tod_net_ct.study import cross_validation
from examples.tod_net_ct.study.cross_validation import read_experiment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXPERIMENT = """
task: liver
patients: {p1: [volume-1, volume-2], p3: [volume-3], p4: [volume-4], p5: [volume-5]}
folds:
  A: {test: [p1, p5], validation: [p3]}
  B: {test: [p3, p4], validation: [p1]}
doses: {low: 0.1}
denoisers: [mse, tod_net@share_task=1]
seeds: [0, 1]
oracles: [unet]
voxel_mm: [8.0, 16.0, 16.0]
preset: smoke
settings:
  {n_train: 0, voxel_mm: [8.0, 16.0, 16.0], shape: [16, 16, 16], patch: [16, 16, 16], task_networks: [unet, vox_resnet],
   task_steps: [2], task_batch: 1, task_validate_every: 1, steps: 1, batch: 1, validate_every: 1, accelerator: cpu}
"""


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(1, 6):
        phantom = abdominal_phantom(number, (16, 32, 32), (8.0, 12.0, 12.0))
        mask = organ_mask(phantom.label, "liver")
        for name, values in (("volume", phantom.volume_hu.round().short()), ("segmentation", mask.byte())):
            image = nibabel.Nifti1Image(values.numpy().transpose(2, 1, 0), np.diag([-12.0, -12.0, 8.0, 1.0]))
            nibabel.save(image, folder / f"{name}-{number}.nii.gz")
    return folder


def run(tmp_path: Path, scans: Path, *more: str) -> int:
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return main(["cross-validate", str(path), "--data", str(scans), "--output", str(tmp_path / "runs"), *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_experiment_goes_on_where_it_stopped(tmp_path, scans, monkeypatch, capsys):
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    measurements = tmp_path / "measurements" / "low"
    assert run(tmp_path, scans, "--minutes", "0") == 0
    assert "the same command goes on from here" in capsys.readouterr().out
    assert [path.name for path in measurements.rglob("*.csv")] == ["none.csv"]
    (measurements / "fold-A" / "none.csv").write_text("kept")

    assert run(tmp_path, scans, "--seeds", "1") == 0
    found = sorted(str(path.relative_to(measurements)) for path in measurements.rglob("*.csv"))
    per_seed = ["seed-1/mse.csv", "seed-1/tod_net-share_task_1.csv"]
    assert found == [f"fold-{fold}/{name}" for fold in "AB" for name in ("none.csv", "oracle.csv", *per_seed)]
    assert (measurements / "fold-A" / "none.csv").read_text() == "kept"

    rows = rows_of(measurements / "fold-B" / "seed-1" / "tod_net-share_task_1.csv")
    curve = [(row["metric"], float(row["value"]) > 0) for row in rows if row["role"] == "training"]
    assert curve == [("validation_rmse_hu_at_1", True)]
    rows = [row for row in rows if row["role"] != "training"]
    assert {row["patient"]: row["case"] for row in rows} == {"p3": "volume-3", "p4": "volume-4"}
    assert {(row["seed"], row["denoiser"], row["fold"]) for row in rows} == {("1", "tod_net@share_task=1", "B")}
    assert {(row["network"], row["role"]) for row in rows if row["metric"] == "dice"} == {
        ("unet", "guide"),
        ("vox_resnet", "unseen"),
    }
    assert {row["role"] for row in rows_of(measurements / "fold-B" / "oracle.csv")} == {"oracle"}
    none = rows_of(measurements / "fold-B" / "none.csv")
    assert {row["input"] for row in none if row["metric"] == "roi_rmse_hu"} == {"low"}  # normal dose is the reference


@pytest.mark.slow
def test_seeds_train_denoisers_that_differ(tmp_path, scans, monkeypatch):
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    monkeypatch.setattr(cross_validation, "UNTRAINED", ())
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.replace("[mse, tod_net@share_task=1]", "[mse]"))
    main(["cross-validate", str(path), "--data", str(scans), "--output", str(tmp_path / "runs")])
    first, second = (
        [row["value"] for row in rows_of(tmp_path / "measurements" / "low" / "fold-A" / f"seed-{seed}" / "mse.csv")]
        for seed in (0, 1)
    )
    assert first != second


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("test: [p3, p4]", "test: [p3]", "expected every patient in the test of one fold, got p1, p3, p5"),
        ("test: [p3, p4]", "test: [p3, p4, p1]", "in the test of one fold, got p1, p1, p3, p4, p5"),
        ("oracles: [unet]", "", "expected an experiment as .*, got .*oracles"),
        ("steps: 1,", "stepps: 1,", "--set stepps: there is no such setting; did you mean 'steps'"),
    ],
    ids=["never tested", "tested twice", "a line is missing", "no such setting"],
)
def test_a_wrong_experiment_is_refused(tmp_path, old, new, words):
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(ValueError, match=words):
        read_experiment(path)


def test_the_committed_experiment_can_be_read():
    root = Path(__file__).parents[3]
    found = read_experiment(root / "results" / "ct" / "lits_liver" / "experiment.yaml")
    assert len(found.patients) == 7 and len(found.seeds) >= 3
    assert found.patients["p6"] == [f"volume-{number}" for number in range(6, 11)]
