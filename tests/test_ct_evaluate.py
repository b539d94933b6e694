"""Evaluation: metrics by hand, statistics on known answers, whole volumes on other grids, the three tables."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from examples.tod_net_ct.settings import PRESETS

pytest.importorskip("monai")
pytest.importorskip("skimage")

from examples.tod_net_ct import evaluate as stage  # noqa: E402
from examples.tod_net_ct.answers import answers, family_note, number, sentence  # noqa: E402
from examples.tod_net_ct.metrics import (  # noqa: E402
    holm,
    image_quality,
    mean_and_sd,
    paired,
    paired_over_seeds,
    surface_distance_mm,
)
from examples.tod_net_ct.paper import departures  # noqa: E402
from examples.tod_net_ct.segment import segment  # noqa: E402
from examples.tod_net_ct.stage import save_tensors  # noqa: E402
from examples.tod_net_ct.tables import as_csv, latex, markdown, tables  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Bright(nn.Module):
    """A task network that finds what is brighter than 0 HU, and demands sides that divide by 16."""

    def forward(self, image):
        assert all(side % 16 == 0 for side in image.shape[2:])
        return torch.cat([torch.full_like(image, 0.5), image], dim=1)


# metrics


def test_surface_distance_by_hand() -> None:
    a, b = torch.zeros(8, 8, 8), torch.zeros(8, 8, 8)
    a[2], b[5] = 1, 1  # two sheets, three slices apart: every surface voxel is 3 x 2.5 mm from the other
    assert surface_distance_mm(a, b, (2.5, 1.0, 1.0)) == pytest.approx(7.5)
    assert surface_distance_mm(a, a, (2.5, 1.0, 1.0)) == 0.0


def test_surface_distance_is_symmetric_and_takes_each_axis_own_spacing() -> None:
    a, b = torch.zeros(4, 9, 9), torch.zeros(4, 9, 9)
    a[1, 4, 4], b[1, 4, 6], b[1, 4, 8] = 1, 1, 1
    # from a: 2 columns; from b: 2 and 4 columns; of 0.5 mm each
    assert surface_distance_mm(a, b, (5.0, 3.0, 0.5)) == pytest.approx((1.0 + 1.0 + 2.0) / 3)
    assert surface_distance_mm(b, a, (5.0, 3.0, 0.5)) == surface_distance_mm(a, b, (5.0, 3.0, 0.5))


@pytest.mark.parametrize("empty", ["prediction", "mask"])
def test_no_surface_no_distance(empty) -> None:
    volumes = {"prediction": torch.ones(4, 4, 4), "mask": torch.ones(4, 4, 4)} | {empty: torch.zeros(4, 4, 4)}
    assert math.isnan(surface_distance_mm(**volumes, voxel_mm=(1.0, 1.0, 1.0)))


def test_without_a_mask_the_roi_is_unknown_and_the_rest_is_not() -> None:
    normal = torch.zeros(2, 16, 16)
    scores = image_quality(normal + 40, normal, torch.zeros(2, 16, 16, dtype=torch.uint8))
    assert all(math.isnan(scores[f"roi_{what}"]) for what in ("ssim", "rmse_hu", "psnr_db"))
    assert scores["whole_rmse_hu"] == pytest.approx(40.0) and scores["whole_psnr_db"] == pytest.approx(20.0)


def test_ssim_is_that_of_scikit_image_over_all_slices_at_once() -> None:
    from skimage.metrics import structural_similarity

    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 16, 20, generator=g) * 600 - 300 for _ in range(2))
    options = {"data_range": 400, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(a.clamp(-200, 200).double().numpy(), b.clamp(-200, 200).double().numpy(), strict=True)
    expected = 100 * np.mean([structural_similarity(s, t, full=True, **options)[1] for s, t in pairs])
    assert image_quality(a, b, torch.ones(3, 16, 20))["whole_ssim"] == pytest.approx(expected)


# statistics


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested() -> None:
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[::2] == pytest.approx([0.04, 0.04]) and math.isnan(adjusted[1])


def test_paired_leaves_out_cases_that_were_not_measured() -> None:
    gap = paired([1.0, 5.0, 3.0, math.nan], [0.0, math.nan, 1.0, 2.0])
    assert gap["n"] == 2 and gap["mean"] == pytest.approx(1.5)
    assert math.isnan(paired([math.nan], [1.0])["mean"])


def test_the_same_numbers_twice_differ_by_nothing() -> None:
    gap = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (gap["mean"], gap["low"], gap["high"], gap["t_p"], gap["wilcoxon_p"]) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_over_seeds_by_hand() -> None:
    scores = {0: ([2.0, 4.0], [1.0, 1.0]), 1: ([4.0, 8.0], [0.0, 0.0])}  # seeds' means: 2 and 6
    found = paired_over_seeds(scores)
    assert (found["mean"], found["n_seeds"], found["n_cases"], found["n_seeds_above"]) == (4.0, 2, 4, 2)
    reach = 12.706204736 * math.sqrt(8 / 2)  # t of one degree of freedom; the means' variance is 8
    assert found["by_seed_low"] == pytest.approx(4 - reach) and found["by_seed_high"] == pytest.approx(4 + reach)
    # within: variances 2 and 8, over n 1 and 4; standard error sqrt(5) / 2, 25 / 17 degrees of freedom
    from scipy import stats

    reach = stats.t.ppf(0.975, 25 / 17) * math.sqrt(5) / 2
    assert found["by_case_low"] == pytest.approx(4 - reach)


def test_over_seeds_tells_luck_of_the_seed_from_a_gain() -> None:
    """Every seed's cases agree among themselves, but the seeds do not agree: no gain, whatever the cases say."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 50))
    scores = {seed: (shift + noise[seed], np.zeros(50)) for seed, shift in enumerate((3.0, -1.0, 2.0, -1.5))}
    found = paired_over_seeds(scores)
    assert found["by_case_p"] < 1e-6 and found["by_seed_p"] > 0.3 and found["by_seed_low"] < 0 < found["by_seed_high"]


def test_one_seed_has_no_interval_over_seeds() -> None:
    found = paired_over_seeds({0: ([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])})
    assert math.isnan(found["by_seed_low"]) and math.isnan(found["by_seed_p"]) and found["by_case_p"] < 0.2


@pytest.mark.parametrize(("scores", "sentence_"), [({}, "at least one seed"), ({3: ([math.nan], [1.0])}, "seed 3:")])
def test_over_seeds_refuses_nothing_to_compare(scores, sentence_) -> None:
    with pytest.raises(ValueError, match=sentence_):
        paired_over_seeds(scores)


def test_mean_and_sd_of_what_was_measured() -> None:
    assert mean_and_sd([1.0, 3.0, math.nan]) == pytest.approx({"mean": 2.0, "sd": math.sqrt(2), "n": 2})
    assert mean_and_sd([math.inf])["n"] == 0


# whole volumes


def test_any_sides_are_padded_and_cropped_again() -> None:
    volume = torch.randn(5, 21, 34) * 100
    assert torch.equal(segment(Bright(), volume), (volume > 0).long())


def test_windows_give_what_one_pass_gives() -> None:
    volume = torch.randn(20, 40, 70) * 100
    found = segment(Bright(), volume, max_voxels=10_000, window=(16, 16, 32))
    assert torch.equal(found, (volume > 0).long())


def test_another_voxel_size_is_resampled_there_and_back() -> None:
    seen = []

    class Watching(Bright):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return super().forward(image)

    z, y, x = torch.meshgrid(torch.arange(16), torch.arange(64), torch.arange(64), indexing="ij")
    ball = ((z - 8) * 3.0) ** 2 + (y - 32) ** 2 + (x - 32) ** 2 < 18**2
    found = segment(Watching(), 200.0 * ball - 100, (3.0, 1.0, 1.0), (1.5, 2.0, 2.0))
    assert seen == [(32, 32, 32)] and found.shape == ball.shape
    assert 2 * (found * ball).sum() / (found.sum() + ball.sum()) > 0.95


def test_the_training_voxel_size_is_left_alone() -> None:
    volume = torch.randn(16, 16, 16) * 100
    assert torch.equal(segment(Bright(), volume, (3.0, 1.0, 1.0), (3.0, 1.0, 1.0)), (volume > 0).long())


# rows, comparisons, tables


def made_up_rows(n: int = 12, networks=("unet", "vnet")) -> list[dict]:
    """Twelve cases where TOD-Net beats MSE-WGAN by 1 (with little scatter) wherever higher is better."""
    rng = np.random.default_rng(1)
    rows = []
    for case in range(n):
        base = rng.normal(80, 5)
        for dose, level in (("low", 0.0), ("normal", 5.0)):
            for denoiser, gain in (("none", -6.0), ("mse_wgan", 0.0), ("tod_net", 1.0)):
                row = {"case": f"test-{case:03d}", "dose": dose, "denoiser": denoiser}
                for key in stage.QUALITY + tuple(
                    f"{name}_{what}" for name in networks for what in ("dice", "surface_mm")
                ):
                    sign = -1 if key.endswith(stage.LOWER_IS_BETTER) else 1
                    row[key] = base + level + sign * (gain + rng.normal(0, 0.1))
                    if (dose, denoiser) == ("normal", "none") and key in stage.QUALITY:
                        row[key] = math.nan
                rows.append(row)
    return rows


@pytest.fixture(scope="module")
def summary() -> dict:
    rows = made_up_rows()
    found = stage.comparisons(rows, ("mse_wgan", "tod_net"), ("unet", "vnet"))
    content = {"n_cases": 12, "n_labelled": 12, "means": stage.means(rows), "comparisons": found, "focus": {}}
    return json.loads(json.dumps(stage._finite(content), allow_nan=False))


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


def test_the_best_is_bold_and_the_differing_are_marked(summary) -> None:
    found = {table.name: table for table in tables(summary, ("unet", "vnet"))}
    cells = dict(found["table2"].rows)
    assert [row for row, _ in found["table2"].rows] == ["normal_dose", "none", "mse_wgan", "tod_net"]
    assert cells["tod_net"][0].best and not cells["normal_dose"][0].best, "normal dose is the ceiling, no contestant"
    assert cells["mse_wgan"][0].mark == "†" and not cells["tod_net"][0].mark
    rmse = {row: cells[1] for row, cells in found["table1"].rows}
    assert rmse["tod_net"].best and not rmse["none"].best, "the lowest RMSE"
    assert [row for row, cells in found["table3"].rows if cells[0].mark] == ["mse_wgan", "tod_net"]


def test_three_ways_to_write_a_table(summary) -> None:
    table = next(table for table in tables(summary, ("unet", "vnet")) if table.name == "table2")
    mean = summary["means"]["low"]["tod_net"]["unet_dice"]["mean"]
    assert f"**{mean:.1f} ± " in markdown(table) and "| No denoiser |" in markdown(table)
    tex = latex(table)
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\textbf{", r"Dice (\%)"))
    assert tex.count("{") == tex.count("}") and "±" not in tex and "†" not in tex
    rows = {(r["denoiser"], r["column"]): r for r in csv.DictReader(io.StringIO(as_csv(table)))}
    assert float(rows["tod_net", "unet_dice"]["mean"]) == pytest.approx(mean, rel=1e-5)
    assert rows["tod_net", "unet_dice"]["best"] == "1" and rows["mse_wgan", "unet_dice"]["significant"] == "1"


def test_latex_groups_columns(summary) -> None:
    tex = latex(next(table for table in tables(summary, ("unet", "vnet")) if table.name == "table1"))
    assert r"\multicolumn{3}{c}{Region of interest}" in tex and r"\cmidrule(lr){5-7}" in tex


def test_what_the_words_say(summary) -> None:
    read = answers(summary, ("unet",), ("unet", "vnet"))
    guided, unseen = list(read.values())[:2]
    assert guided[1].startswith("Minus MSE-WGAN: U-Net +0.9") and "significantly better in 1 of 1" in guided[1]
    assert "V-Net" in unseen[1] and "U-Net" not in unseen[1]


def test_the_words_fall_the_other_way_too(summary) -> None:
    turned = [g | {"mean": -g["mean"], "better": not g["better"]} for g in summary["comparisons"]]
    assert (
        "significantly worse in 1 of 1"
        in list(answers(summary | {"comparisons": turned}, ("unet",), ("unet",)).values())[0][1]
    )


def test_too_few_cases_are_said_to_be_too_few(summary) -> None:
    few = stage.comparisons(made_up_rows(4), ("mse_wgan", "tod_net"), ("unet", "vnet"))
    assert "no difference can be significant in Table 1, Table 2, " in family_note({"comparisons": few})
    assert "no difference can be significant" not in family_note(summary)
    read = answers(summary | {"comparisons": few}, ("unet",), ("unet", "vnet"))
    assert all("4 cases are too few to test" in line for lines in read.values() for line in lines)


def test_a_p_value_is_never_zero(summary) -> None:
    assert number(1e-9) == "< 0.0001" and number(0.0123) == "0.012" and number(None) == ""
    gap = next(gap for gap in summary["comparisons"] if gap["key"] == "unet_dice" and gap["theirs"] == "mse_wgan")
    assert sentence(gap).startswith("U-Net Dice (%): TOD-Net minus MSE-WGAN +")


def test_departures_from_the_paper() -> None:
    found = {name: (own, stated) for name, own, stated in departures(PRESETS["demo"])}
    assert found["optimizer"] == ("adam", "rmsprop") and found["shape"] == ("16, 64, 64", "32, 256, 256")
    assert "clip" not in found, "the demo clips as the paper does"


# the stage


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
    facts = {"shape": settings.shape, "voxel_mm": settings.voxel_mm, "overlap": 0.5}
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
    from examples.tod_net_ct.data import Cases

    settings, folder = run
    for index in range(2):  # on the training grid, and on another
        low, normal, mask = stage.training_view(Cases(folder, "test"), index, replace(settings, shape=(8, 16, 16)))
        assert low.shape == normal.shape == mask.shape == (1, 1, 8, 16, 16)
    low, normal, mask = stage.training_view(Cases(folder, "test"), 0, settings)
    assert torch.equal(mask[0, 0] > 0, normal[0, 0] > 0.5)
