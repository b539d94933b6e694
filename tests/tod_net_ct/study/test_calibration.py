"""Calibration by the task, with a network simple enough to know: a threshold between the organ and the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.tod_net_ct.dose import degrade
from examples.tod_net_ct.metrics import dice, image_quality
from examples.tod_net_ct.run import Settings, load_tensors, save_tensors, write_text
from examples.tod_net_ct.study import calibration as command
from examples.tod_net_ct.study.calibration import calibrate

pytest.importorskip("joblib")
pytest.importorskip("monai")
pytest.importorskip("skimage")
# MONAI warns about its own internals
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SETTINGS = Settings(voxel_mm=(5.0, 9.0, 9.0), n_views=30, kernel="hann", accelerator="cpu")


class Threshold(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([0.65 - image, image - 0.65], dim=1)


def case(shape: tuple[int, int, int] = (8, 32, 32)) -> dict[str, Tensor]:
    volume, mask = torch.full(shape, -1000, dtype=torch.int16), torch.zeros(shape, dtype=torch.uint8)
    volume[:, 6:-6, 4:-4] = 0
    mask[:, 10:18, 8:20] = 1
    volume[mask > 0] = 120
    return {"normal_hu": volume, "mask": mask, "voxel_mm": torch.tensor(SETTINGS.voxel_mm)}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    monkeypatch.setattr(command, "load_task", lambda settings, run, name: Threshold().eval())
    write_text(tmp_path / "task" / "unet" / "weights.pt", "")
    write_text(tmp_path / "cases" / "manifest.json", json.dumps({"facts": {}, "results": {}}))
    for name in ("test-000", "train-000", "validation-000", "validation-001"):
        save_tensors(tmp_path / "cases" / f"{name}.pt", **case())
    return tmp_path


def test_it_finds_the_dose_that_costs_the_wanted_dice(run, capsys) -> None:
    found = json.loads(calibrate(SETTINGS, run, drop=15.0).read_text())
    at = {trial["i0_photons"]: trial for trial in found["trials"]}
    assert found["normal_dice"] == 100.0 and found["n_cases"] == 2
    assert abs(at[found["i0_photons"]]["dice_lost"] - 15.0) <= 0.1
    assert [*at] == sorted(at) and min(at) == 1e3 and max(at) == 1e6
    lost = [at[i0]["dice_lost"] for i0 in sorted(at)]
    assert lost == sorted(lost, reverse=True), "the same seeds at every dose make a smooth curve"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(at) + 2
    assert printed[-1] == found["said"]
    assert f"--set i0_photons={found['i0_photons']:.0f} means" in printed[-1]


def test_a_noisy_normal_dose_stays_and_its_share_is_sought(run, capsys) -> None:
    noisy = replace(SETTINGS, i0_photons=1e5, dose_fraction=0.5)
    found = json.loads(calibrate(noisy, run, drop=15.0).read_text())
    share = found["i0_photons"] / 1e5
    assert 0.01 <= share < 0.5 and f"--set dose_fraction={share:.3g}" in capsys.readouterr().out
    assert found["settings"]["dose_fraction"] == 0.5 and max(t["i0_photons"] for t in found["trials"]) == 1e5


def test_the_answer_is_tried_as_the_stage_would_make_it(run) -> None:
    found = json.loads(calibrate(SETTINGS, run, drop=15.0).read_text())
    trial = found["as_simulated"]
    assert trial["i0_photons"] == found["i0_photons"]
    assert abs(trial["dice_lost"] - 15.0) < 3.0
    degrade(replace(SETTINGS, i0_photons=trial["i0_photons"]), run)
    overlaps, whole, roi = [], [], []
    for name in ("validation-000", "validation-001"):
        low_hu = load_tensors(run / "low_dose" / f"{name}.pt")["low_hu"].float()
        scores = image_quality(low_hu, case()["normal_hu"].float(), case()["mask"])
        overlaps.append(100 * dice(Threshold()(((low_hu + 200) / 400)[None, None]).argmax(1)[0], case()["mask"]))
        whole.append(scores["whole_rmse_hu"])
        roi.append(scores["roi_rmse_hu"])
    assert trial["dice"] == pytest.approx(sum(overlaps) / 2, abs=1e-3)
    assert trial["whole_rmse_hu"] == pytest.approx(sum(whole) / 2)
    assert trial["roi_rmse_hu"] == pytest.approx(sum(roi) / 2)
    assert trial["dice_lost"] == pytest.approx(found["normal_dice"] - trial["dice"])


@pytest.mark.parametrize(
    ("drop", "bracket", "sentence"),
    [
        (99.0, (1e4, 1e6), "even 10000 photons cost only "),
        (1.0, (1e3, 2e3), "even 2000 photons cost "),
    ],
    ids=["too much", "too little"],
)
def test_a_drop_out_of_reach_is_one_sentence_and_no_answer(run, capsys, drop, bracket, sentence) -> None:
    found = json.loads(calibrate(SETTINGS, run, drop=drop, bracket_photons=bracket).read_text())
    assert found["i0_photons"] is found["as_simulated"] is None and found["said"].startswith(sentence)
    assert capsys.readouterr().out.splitlines()[-1] == found["said"]


def test_only_labelled_simulated_validation_cases_count(run) -> None:
    empty, pair = case(), case()
    empty["mask"] = torch.zeros_like(empty["mask"])
    pair["low_hu"] = pair["normal_hu"]
    save_tensors(run / "cases" / "validation-000.pt", **empty)
    assert json.loads(calibrate(SETTINGS, run, n_steps=0).read_text())["n_cases"] == 1
    save_tensors(run / "cases" / "validation-001.pt", **pair)
    with pytest.raises(ValueError, match="no validation case has a mask to calibrate by; prepare with --set n_valid"):
        calibrate(SETTINGS, run)


def test_a_run_without_its_network_and_a_drop_of_nothing_are_one_sentence(run) -> None:
    with pytest.raises(ValueError, match=r"^--drop: expected points of Dice above 0, got -1; for example --drop 5.5$"):
        calibrate(SETTINGS, run, drop=-1)
    (run / "task" / "unet" / "weights.pt").unlink()
    with pytest.raises(ValueError, match="holds no trained unet; run train-task first"):
        calibrate(SETTINGS, run)
    assert not (run / "calibration.json").exists()
