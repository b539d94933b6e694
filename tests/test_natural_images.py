"""The study on natural images: small enough to run here, on images and networks made up by a seed."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from examples import natural_images as study
from examples.natural_worlds import CifarResNet, cifar10

SHARED = Path(__file__).parents[2] / "shared" / "data" / "natural"
TINY = ["--steps", "2", "--batch", "2", "--seeds", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A CIFAR-10 of noise and the four ResNets with random weights, laid out as the real ones."""
    folder = tmp_path_factory.mktemp("data")
    draws = np.random.default_rng(0)
    arrays = {f"{part}_images": draws.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in SIZES.items()}
    arrays |= {f"{part}_labels": np.arange(n) % 10 for part, n in SIZES.items()}
    np.savez(folder / "cifar10.npz", **arrays)
    (folder / "resnet_cifar10").mkdir()
    torch.manual_seed(0)
    for depth in (20, 32, 44, 56):
        weights = {f"module.{key}": value for key, value in CifarResNet(depth).state_dict().items()}
        torch.save({"state_dict": weights}, folder / "resnet_cifar10" / f"resnet{depth}-0.th")
    return folder


SIZES = {"train": 8, "test": 20}


def rows_of(path) -> dict[tuple[str, str, str], str]:
    with path.open(newline="") as file:
        return {(row["setting"], row["network"], row["metric"]): row["value"] for row in csv.DictReader(file)}


def test_the_study_runs_and_gathers_its_results(data, tmp_path, capsys) -> None:
    settings = ["degraded", "oracle", "mse", "two_augmented"]
    arguments = ["--data", str(data), "--output", str(tmp_path), *TINY, "--settings", *settings]
    study.main([*arguments, "--alarm"])
    printed = capsys.readouterr().out
    assert "the transfer meter on half, two_augmented: " in printed and "the guide gains" in printed
    rows = rows_of(tmp_path / "exploration.csv")
    assert {setting for setting, _, _ in rows} == set(settings)
    assert float(rows["degraded", "", "psnr_db"]) < 20
    assert {metric for setting, _, metric in rows if setting == "mse"} >= {
        "top1",
        "ssim",
        "clean_top1",
        "clean_psnr_db",
    }
    with (tmp_path / "exploration.csv").open(newline="") as file:
        roles = {(row["setting"], row["network"]): row["role"] for row in csv.DictReader(file)}
    assert roles["mse", "resnet20"] == "judge" and roles["two_augmented", "resnet20"] == "guide"
    assert roles["two_augmented", "resnet32"] == "guide" and roles["two_augmented", "resnet44"] == "judge"
    study.main(arguments)  # all done: judged no more
    assert rows_of(tmp_path / "exploration.csv") == rows


def trained(run: study.Run, world, output) -> dict[str, torch.Tensor]:
    """The weights after training in a folder of its own."""
    (output / run.name).mkdir(parents=True, exist_ok=True)
    return study.train(run, world, output).state_dict()


def test_a_killed_training_goes_on_to_the_same_bits(data, tmp_path, monkeypatch) -> None:
    world = cifar10(data, None)
    run = study.Run("cifar10", "noise25", "two_augmented", "exploration", 0, 5, 1, 1e-3)
    monkeypatch.setattr(study, "SAVE_EVERY", 2)
    whole = trained(run, world, tmp_path / "whole")
    calls = iter(range(10**6))
    draw = study.degraded_batch

    def dies(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(study, "degraded_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(run, world, tmp_path / "killed")
    resumed = trained(run, world, tmp_path / "killed")
    assert next(calls) == 4 + 3  # steps 2, 3 and 4 only
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_late_setting_from_the_trunk_is_one_from_the_start(data, tmp_path) -> None:
    world = cifar10(data, None)
    mse, late = (study.Run("cifar10", "noise25", name, "exploration", 0, 3, 2, 1e-3) for name in ("mse", "late"))
    plain = trained(mse, world, tmp_path / "shared")
    assert torch.load(tmp_path / "shared" / mse.name / "trunk.pt", weights_only=True)["step"] == 2
    shared, alone = (trained(late, world, tmp_path / name) for name in ("shared", "alone"))
    assert all(torch.equal(shared[name], tensor) for name, tensor in alone.items())
    assert not torch.equal(plain["last.weight"], alone["last.weight"])


def test_the_settings_differ_in_nothing_but_the_loss(data, tmp_path) -> None:
    world = cifar10(data, None)
    first = {}
    for setting in ("mse", "task"):
        run = study.Run("cifar10", "noise25", setting, "exploration", 0, 1, 2, 0.0)
        first[setting] = trained(run, world, tmp_path)
        state = torch.load(tmp_path / run.name / "state.pt", weights_only=True)
        first[setting] |= {"draws": state["draws"]}
    assert all(torch.equal(first["mse"][name], tensor) for name, tensor in first["task"].items())


def test_the_confirming_images_are_looked_at_by_no_other_stage(data) -> None:
    world = cifar10(data, None)
    world.test.pixels[:, 0, 0, 0] = torch.arange(20, dtype=torch.uint8)
    seen = {stage: set(world.judged(stage).pixels[:, 0, 0, 0].tolist()) for stage in ("pilot", "confirming")}
    assert seen["pilot"] == {0, 10} and seen["confirming"] == {1, 4, 11, 14}


@pytest.mark.parametrize("degradation", [*study.DEGRADATIONS])
def test_degradations_are_in_range_and_repeat(degradation) -> None:
    clean = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, again = (study.DEGRADATIONS[degradation](clean, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == clean.shape
    error = float((one - clean).square().mean().sqrt())
    expected = {"none": 0, "noise25": 25 / 255, "noise50": 50 / 255}
    assert error == pytest.approx(expected.get(degradation, error), rel=0.05)
    assert (error > 0) == (degradation != "none")


def test_a_restorer_starts_as_the_identity() -> None:
    degraded = torch.rand(1, 3, 32, 32)
    assert torch.equal(study.Restorer()(degraded), degraded)


def test_folding_changes_no_prediction() -> None:
    torch.manual_seed(0)
    network = CifarResNet(20).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    image = torch.rand(2, 3, 32, 32)
    before = network(image)
    assert torch.allclose(network.folded()(image), before, atol=1e-4)


def test_missing_networks_get_one_sentence(data, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"expected resnet20-\*.th, got none; git clone"):
        study.main(["--data", str(data), "--networks", str(tmp_path)])


@pytest.mark.skipif(not SHARED.exists(), reason="the real images are not here")
def test_the_real_networks_know_the_real_images() -> None:
    world = cifar10(SHARED, None)
    images = world.test.part(3, of=50)
    scores = study.judge(torch.nn.Identity(), "none", images, {"resnet20": world.networks["resnet20"]})
    assert 70 < scores["resnet20", "top1"] < 95
