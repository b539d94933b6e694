"""The study's arithmetic, the page that it keeps, and denoisers on real pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.networks import Denoiser, save_checkpoint
from examples.tod_net_ct.run import PRESETS, Settings, stage
from examples.tod_net_ct.study import cost, summary
from examples.tod_net_ct.study import seeds as study
from examples.tod_net_ct.training import recipes as denoisers

nibabel = pytest.importorskip("nibabel")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

RESULTS = study.RESULTS


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


def rows(denoiser: str, dose: str, shift: float) -> list[dict]:
    """Three cases whose every number is the case's own plus a shift."""
    keys = (*summary.COLUMNS, *summary.DICE)
    return [
        {"case": f"test-{i:03d}", "dose": dose, "denoiser": denoiser, **dict.fromkeys(keys, 10.0 * i + shift)}
        for i in range(3)
    ]


@pytest.fixture
def measured(tmp_path) -> Path:
    """Two seeds: TOD-Net is above MSE-WGAN by 1 and by 3, and 2 below the image as it came on normal dose."""
    shifts = {0: {"none": 0, "mse_wgan": 5, "tod_net": 6}, 1: {"none": 0, "mse_wgan": 5, "tod_net": 8}}
    for seed, by_name in shifts.items():
        for name, shift in by_name.items():
            both = rows(name, "low", shift) + rows(name, "normal", 0 if name == "none" else -2)
            study.write_text(study.file_of(tmp_path, seed, name), study.as_csv(both))
    return tmp_path


def test_differences_are_paired_by_seed_and_case(measured) -> None:
    summary.summarise(measured)
    found = json.loads((measured / "study.json").read_text())
    (gap,) = [gap for gap in found["answers"] if gap["question"] == "a" and gap["theirs"] == "mse_wgan"]
    assert (gap["mean"], gap["n_seeds"], gap["n_seeds_above"], gap["n_cases"]) == (2.0, 2, 2, 6)
    # two seeds with means 1 and 3: standard error 1, and t(0.975, 1) = 12.706
    assert gap["by_seed_low"] == pytest.approx(2 - 12.7062, abs=1e-3)
    harm = [gap["mean"] for gap in found["answers"] if gap["question"] == "d"]
    assert harm == [-2.0] * 4
    assert found["means"]["low"]["tod_net"]["unet_dice"] == pytest.approx(10 + 7)
    assert found["seeds"]["tod_net"] == [0, 1]


def test_a_question_without_measurements_is_left_out_and_none_at_all_is_one_sentence(measured, tmp_path) -> None:
    text = summary.summarise(measured)
    assert "(a)" in text and "(h)" not in text and "VGG" not in text
    with pytest.raises(ValueError, match="expected measurements, found none; run the study first"):
        summary.summarise(tmp_path / "nowhere")


def test_the_readme_is_refreshed_between_its_marks_alone() -> None:
    begin = "begin, written by `study --summary-only`"
    text = "\n".join(f"before\n<!-- {m}: {begin} -->\nold\n<!-- {m}: end -->" for m in ("cost", "study"))
    assert summary.refreshed(text, r"new \1") == text.replace("-->\nold\n<!-- study", "-->\nnew \\1\n<!-- study")
    assert summary.refreshed(text, "new", "cost") == text.replace("old", "new", 1)


def test_the_cost_is_extrapolated_by_voxels() -> None:
    measured = [{"side": s, "cpu_seconds_per_step": s * s / 256, "peak_gb": 1 + s * s / 4096} for s in (64, 128)]
    words = " ".join(cost.sentences(measured))
    # 64 x 64 is a 64th of the paper's step: 64 times 16 s, and 64 times its 1 GB above the start
    assert "takes 17 to 17 minutes of a core and about 64 GB" in words
    assert cost.flop_per_voxel(1) == 6 * 27 * (2 * (1 + 2 + 8 + 32))


@pytest.mark.parametrize("text", ["[", "[]", "{}", "null", '[{"side": 64}]', "\x00"])
def test_a_damaged_cost_is_one_sentence(text, tmp_path) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ValueError, match=r"cost.json: expected what the command cost measured, got a damaged file; "):
        summary._cost_in_words(tmp_path / "cost.json")


@pytest.mark.skipif(not (RESULTS / "study.json").exists(), reason="no study is committed")
def test_the_committed_numbers_are_those_of_the_committed_measurements(tmp_path) -> None:
    import shutil

    copy = Path(shutil.copytree(RESULTS, tmp_path / "results"))
    for name in ("study.json", "study.md"):
        (copy / name).unlink()
    summary.summarise(copy)
    assert (copy / "study.md").read_text() == (RESULTS / "study.md").read_text(), "study.md: study --summary-only"

    def rounded(digits: str) -> str:
        return f"{float(digits):.6g}"  # the last digits of a sum are the NumPy release's own

    ours, theirs = (
        json.loads((folder / "study.json").read_text(), parse_float=rounded, parse_int=rounded)
        for folder in (copy, RESULTS)
    )
    assert ours == theirs, "study.json is stale: study --summary-only"
    found = json.loads((copy / "study.json").read_text())
    for path in summary.READMES:
        text = path.read_text()
        assert summary.readme(text, found, RESULTS) == text, f"{path.name} is stale: study --summary-only"


def test_a_study_measures_what_is_missing_and_nothing_else(tmp_path, monkeypatch) -> None:
    done: list[tuple[str, int]] = []
    for name in ("prepare", "degrade", "train_task"):
        monkeypatch.setattr(study, name, lambda *_: None)
    monkeypatch.setattr(study, "train_denoiser", lambda name, settings, run: done.append((name, settings.seed)))
    monkeypatch.setattr(study, "measure", lambda name, settings, run: rows(name, "low", 0) + rows(name, "normal", 0))
    names = ("tod_net", study.ABLATIONS[0])
    study.study(Settings(), [0, 1], names, tmp_path / "runs", tmp_path)
    assert done == [("tod_net", 0), ("tod_net", 1), (study.ABLATIONS[0], 0), (study.ABLATIONS[0], 1)]
    study.file_of(tmp_path, 1, "tod_net").unlink()
    study.study(Settings(), [0, 1], names, tmp_path / "runs", tmp_path)
    assert done[4:] == [("tod_net", 1)]


def pair_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    for name in ("P1_a", "P2_a"):
        full = 40 + 20 * torch.randn(1, 24, 20)
        for role, volume in (("full", full), ("quarter", full + 30 * torch.randn(1, 24, 20))):
            image = nibabel.Nifti1Image(
                volume.permute(2, 1, 0).round().short().numpy(), torch.diag(torch.tensor([1.0, 1, 3, 1])).numpy()
            )
            folder.mkdir(exist_ok=True)
            nibabel.save(image, folder / f"{name}_{role}.nii.gz")
    return folder


def test_pairs_are_measured_before_and_after(tmp_path, capsys) -> None:
    data = pair_folder(tmp_path / "data")
    torch.manual_seed(0)
    network = Denoiser(1)
    torch.nn.init.zeros_(network.narrow[-1].weight)
    torch.nn.init.zeros_(network.narrow[-1].bias)
    save_checkpoint(tmp_path / "identity.pt", network)
    arguments = ["pairs", str(data), "--output", str(tmp_path), "--checkpoint", f"identity={tmp_path / 'identity.pt'}"]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "pairs.json").read_text())
    assert found["none"]["whole_rmse_hu"]["mean"] == pytest.approx(30, rel=0.1)
    assert found["identity"]["whole_rmse_hu"]["mean"] == pytest.approx(found["none"]["whole_rmse_hu"]["mean"], abs=1e-3)
    assert found["none"]["whole_rmse_hu"]["n"] == 2
    assert main([*arguments, "--patient", "P1"]) == 0
    assert json.loads((tmp_path / "pairs.json").read_text())["none"]["whole_rmse_hu"]["n"] == 1
    assert main([*arguments, "--patient", "P3"]) == 2
    assert "found none" in capsys.readouterr().err


def test_a_training_starts_from_a_checkpoint_of_the_same_architecture(tmp_path) -> None:
    torch.manual_seed(0)
    trained = Denoiser(2)
    save_checkpoint(tmp_path / "best.pt", trained)
    settings = replace(PRESETS["smoke"], start_from=str(tmp_path / "best.pt"))
    network = denoisers.network_of(denoisers.RECIPES["mse"], settings)
    assert torch.equal(network.widen[0].weight, trained.widen[0].weight)
    with pytest.raises(ValueError, match="start_from: .*best.pt has"):
        denoisers.network_of(denoisers.RECIPES["mse"], replace(settings, width=3))


def test_what_was_tuned_comes_before_a_names_own_changes() -> None:
    settings = replace(Settings(), tuned=("vgg_wgan@share_adv=0.03", "tod_net@share_adv=0.1;clip=0.5"))
    assert denoisers.parse("vgg_wgan", settings)[1].share_adv == 0.03
    assert denoisers.parse("mse_wgan", settings)[1].share_adv == Settings().share_adv
    changed = denoisers.parse("tod_net@clip=0.2", settings)[1]
    assert (changed.share_adv, changed.clip) == (0.1, 0.2)


def test_tuning_tries_the_same_values_on_every_denoiser_and_keeps_what_others_wrote(tmp_path, monkeypatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(study, "make_ready", lambda *_: None)
    monkeypatch.setattr(study, "train_denoiser", lambda name, settings, run: trained.append(name) or name)
    errors = {"0.3": 0.2, "0.03": 0.1, "0.003": 0.3}
    monkeypatch.setattr(study, "results_of", lambda name: {"best_validation": errors[name.partition("=")[2]]})
    study.tune(Settings(), ["mse_wgan"], tmp_path / "runs", tmp_path)
    tuning = study.tune(Settings(), ["tod_net"], tmp_path / "runs", tmp_path)
    assert trained == [f"{n}@share_adv={v}" for n in ("mse_wgan", "tod_net") for v in errors]
    assert tuning["tuned"] == ["mse_wgan@share_adv=0.03", "tod_net@share_adv=0.03"]
    assert json.loads((tmp_path / "tuning.json").read_text()) == tuning
    assert "| MSE-WGAN | 0.200000 | **0.100000** | 0.300000 |" in summary._tuning_table(tuning)


@pytest.mark.skipif(not (RESULTS / "tuning.json").exists(), reason="no tuning is committed")
def test_the_study_runs_with_what_the_committed_tuning_chose() -> None:
    tuned = json.loads((RESULTS / "tuning.json").read_text())["tuned"]
    (own,) = [entry for entry in tuned if entry.startswith("tod_net@")]
    assert list(PRESETS["study"].tuned) == [*tuned, own.replace("tod_net", "label_free")]


def test_a_training_under_another_name_is_not_done_twice(tmp_path) -> None:
    facts = {"denoiser": "tod_net@clip=0.2", "clip": 0.2, "seed": 3}
    stage.begin(tmp_path / "first", facts)
    (tmp_path / "first" / "best.pt").write_bytes(b"weights")
    stage.finish(tmp_path / "first", facts, best_validation=0.5)
    assert not stage.take_twin(tmp_path / "other", {**facts, "seed": 4}, "denoiser")
    own = {**facts, "denoiser": "tod_net"}
    assert stage.take_twin(tmp_path / "second", own, "denoiser") and stage.is_done(tmp_path / "second", own)
    assert (tmp_path / "second" / "best.pt").read_bytes() == b"weights"
    assert stage.results_of(tmp_path / "second") == {"best_validation": 0.5}


DAMAGED = {"empty": b"", "a list": b"[]", "null": b"null", "cut": b'{"validation_mse": {"tod', "no text": b"\xff\xfe\0",
           "another's": b'{"seed": 0}', "of another kind": b'{"validation_mse": {"tod_net": 3}}'}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_tuning_is_told_and_not_written_over(tmp_path, content, monkeypatch) -> None:
    monkeypatch.setattr(study, "make_ready", lambda *_: None)
    monkeypatch.setattr(study, "train_denoiser", lambda name, settings, run: name)
    monkeypatch.setattr(study, "results_of", lambda name: {"best_validation": 0.5})
    (tmp_path / "tuning.json").write_bytes(content)
    with pytest.raises(ValueError, match="tuning.json: expected .*; remove it to tune anew$"):
        study.tune(Settings(), ["mse_wgan"], tmp_path / "runs", tmp_path)
    assert (tmp_path / "tuning.json").read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[: whole.rindex(b",")],
        lambda whole: whole.replace(b"15.0000", b"1S.0000", 1),
        lambda whole: whole.replace(b"dose", b"does", 1),
        lambda whole: whole.replace(b"test-001,", b",", 1),
        lambda whole: whole.replace(b"test-001,", b"test-001,,", 1),
        lambda whole: b"\xff\xfe" + whole,
    ],
    ids=["empty", "cut", "cut in the last line", "a letter", "a heading", "no name", "a cell too many", "no text"],
)
def test_damaged_measurements_are_named(measured, damage) -> None:
    path = study.file_of(measured, 1, "mse_wgan")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"mse_wgan.csv: expected rows of measurements, got a damaged file; remove it"):
        summary.read(measured)


def test_a_folder_that_is_no_seed_s_is_named(measured) -> None:
    (measured / "measurements" / "seed-1").rename(measured / "measurements" / "seed-one")
    with pytest.raises(ValueError, match="seed-one: expected a folder seed-N, N a number, got seed-one; rename it"):
        summary.read(measured)
