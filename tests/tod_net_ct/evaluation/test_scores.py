"""The evaluation: its families of comparisons, and the stage on two made-up cases."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from examples.tod_net_ct.evaluation import scores as stage
from examples.tod_net_ct.metrics import holm
from examples.tod_net_ct.run import PRESETS, save_tensors
from tests.tod_net_ct.doubles import Bright, made_up_rows, made_up_summary

pytest.importorskip("monai")
pytest.importorskip("skimage")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def summary() -> dict:
    return made_up_summary()


def test_the_family_is_one_table(summary) -> None:
    sizes = {gap["table"]: gap["family"] for gap in summary["comparisons"]}
    assert sizes == {"table1": 12, "table2": 4, "table3": 4, "table2_surface": 4, "table3_surface": 4}
    table2 = [gap for gap in summary["comparisons"] if gap["table"] == "table2"]
    assert [g["wilcoxon_holm"] for g in table2] == pytest.approx(holm([g["wilcoxon_p"] for g in table2]))


def test_better_knows_that_a_lower_error_is_better(summary) -> None:
    gaps = {(g["table"], g["theirs"], g["key"]): g for g in summary["comparisons"]}
    assert gaps["table1", "mse_wgan", "roi_rmse_hu"]["mean"] < 0 and gaps["table1", "mse_wgan", "roi_rmse_hu"]["better"]
    assert gaps["table2_surface", "mse_wgan", "vnet_surface_mm"]["better"]


def test_without_the_reference_there_is_no_claim() -> None:
    found = stage.comparisons(made_up_rows(), ("mse_wgan",), ("unet",))
    assert {gap["table"] for gap in found} == {"table3", "table3_surface"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two cases of a bright box: one with a mask on a grid of its own, one without; a denoiser that halves noise."""
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    settings = replace(
        PRESETS["smoke"], n_train=0, n_validation=0, n_test=2, voxel_mm=(2.0, 2.0, 2.0), shape=(16, 32, 32),
        task_networks=("unet", "vnet"), denoisers=("tod_net",),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    about = {}
    for i, voxel_mm in enumerate(((2.0, 2.0, 2.0), (2.0, 1.0, 1.0))):
        size = (16, 32, 32) if i == 0 else (14, 60, 61)
        mask = torch.zeros(size, dtype=torch.uint8)
        mask[4:10, size[1] // 4 : -size[1] // 4, size[2] // 4 : -size[2] // 4] = 1
        normal_hu = (200.0 * mask - 100).to(torch.int16)
        low_hu = (normal_hu + 60 * torch.randn(size, generator=g)).to(torch.int16)
        if i == 1:
            mask = torch.zeros_like(mask)
        name = f"test-{i:03d}"
        save_tensors(tmp_path / f"cases/{name}.pt", normal_hu=normal_hu, mask=mask, voxel_mm=torch.tensor(voxel_mm))
        save_tensors(tmp_path / f"low_dose/{name}.pt", low_hu=low_hu)
        about[name] = {"training_slices": size[0], "on_training_grid": i == 0}
    facts = {"shape": settings.shape, "voxel_mm": settings.voxel_mm, "overlap": 0.5, "organ": settings.organ}
    manifest = json.dumps({"facts": facts, "results": {"cases": about}})
    for folder in ("cases", "low_dose", "denoisers/tod_net"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "manifest.json").write_text(manifest)
    for name in settings.task_networks:
        save_tensors(tmp_path / "task" / name / "weights.pt", nothing=torch.zeros(1))
    monkeypatch.setattr(stage, "load_task", lambda *_: Bright())
    monkeypatch.setattr(stage, "restorer", lambda *_: lambda volume: torch.where(volume > 0, 0.5, 1.0) * volume)
    monkeypatch.setattr(stage, "focus", lambda *_: {})
    return settings, tmp_path


def test_every_case_dose_and_denoiser_has_its_row(run) -> None:
    settings, folder = run
    stage.evaluate(settings, folder)
    rows = {(r["case"], r["dose"], r["denoiser"]): r for r in stage.read_rows(folder)}
    assert len(rows) == 2 * 2 * 2
    ideal = rows["test-000", "normal", "none"]
    assert ideal["unet_dice"] == 100 and ideal["vnet_surface_mm"] == 0 and math.isnan(ideal["whole_ssim"])
    assert rows["test-000", "low", "none"]["unet_dice"] < 100
    without = rows["test-001", "low", "tod_net"]
    assert math.isnan(without["unet_dice"]) and math.isnan(without["roi_ssim"]) and without["whole_rmse_hu"] > 0
    assert "nan" not in (folder / "evaluation" / "cases.csv").read_text(), "a blank is blank"
    summary = json.loads((folder / "evaluation" / "summary.json").read_text())
    assert (summary["n_cases"], summary["n_labelled"]) == (2, 1)
    assert "NaN" not in (folder / "evaluation" / "summary.json").read_text(), "JSON has no NaN"


def test_the_oracle_has_a_row_of_its_own_and_enters_no_comparison(run) -> None:
    settings, folder = run
    settings = replace(settings, oracles=("unet",))
    save_tensors(folder / "oracle" / "unet" / "weights.pt", nothing=torch.zeros(1))
    stage.evaluate(settings, folder)
    rows = {r["case"]: r for r in stage.read_rows(folder) if r["denoiser"] == "oracle"}
    none = {r["case"]: r for r in stage.read_rows(folder) if (r["dose"], r["denoiser"]) == ("low", "none")}
    assert rows["test-000"]["unet_dice"] == none["test-000"]["unet_dice"] < 100, "low dose as it came"
    assert math.isnan(rows["test-000"]["vnet_dice"]) and math.isnan(rows["test-000"]["whole_rmse_hu"])
    summary = stage.read_summary(folder)
    assert not any("oracle" in (gap["ours"], gap["theirs"]) for gap in summary["comparisons"])
    stamp = (folder / "evaluation" / "cases.csv").stat().st_mtime_ns
    save_tensors(folder / "oracle" / "unet" / "weights.pt", nothing=torch.ones(1))
    stage.evaluate(settings, folder)
    assert (folder / "evaluation" / "cases.csv").stat().st_mtime_ns != stamp, "another oracle is another result"


def test_a_killed_evaluation_goes_on_where_it_was(run, monkeypatch) -> None:
    settings, folder = run
    whole, measured = stage.measure_case, []

    def killed_at_the_second(cases, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return whole(cases, index, *rest)

    def counted(cases, index, *rest):
        measured.append(index)
        return whole(cases, index, *rest)

    monkeypatch.setattr(stage, "measure_case", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        stage.evaluate(settings, folder)
    monkeypatch.setattr(stage, "measure_case", counted)
    stage.evaluate(settings, folder)
    assert measured == [1] and len(stage.read_rows(folder)) == 8
    assert not (folder / "evaluation" / "unfinished").exists()


def test_other_weights_are_evaluated_anew(run) -> None:
    settings, folder = run
    stage.evaluate(settings, folder)
    stamp = (folder / "evaluation" / "cases.csv").stat().st_mtime_ns
    stage.evaluate(settings, folder)
    assert (folder / "evaluation" / "cases.csv").stat().st_mtime_ns == stamp
    save_tensors(folder / "task" / "vnet" / "weights.pt", nothing=torch.ones(1))
    stage.evaluate(settings, folder)
    assert (folder / "evaluation" / "cases.csv").stat().st_mtime_ns != stamp


def test_what_is_missing_is_named(run) -> None:
    from examples.tod_net_ct.report import report

    settings, folder = run
    with pytest.raises(ValueError, match="evaluation: expected a finished evaluation, got none"):
        report(settings, folder)
    (folder / "task" / "vnet" / "weights.pt").unlink()
    with pytest.raises(ValueError, match="vnet: expected a finished stage, got none"):
        stage.evaluate(settings, folder)


def test_fig_2_sees_the_training_grid_around_the_organ(run) -> None:
    from examples.tod_net_ct.scans import Cases

    settings, folder = run
    for index in range(2):  # on the training grid, and on another
        low, normal, mask = stage.training_view(Cases(folder, "test"), index, replace(settings, shape=(8, 16, 16)))
        assert low.shape == normal.shape == mask.shape == (1, 1, 8, 16, 16)
    low, normal, mask = stage.training_view(Cases(folder, "test"), 0, settings)
    assert torch.equal(mask[0, 0] > 0, normal[0, 0] > 0.5)
