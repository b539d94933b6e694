"""An organ and its tumours as two classes: label maps from phantoms and from data sets, up to every network's Dice."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("lightning_fabric")
pytest.importorskip("nibabel")

import nibabel

from examples.tod_net_ct.dose import degrade
from examples.tod_net_ct.evaluation import measure_case
from examples.tod_net_ct.run import PRESETS, Settings, load_tensors
from examples.tod_net_ct.scans import Cases, abdominal_phantom, prepare
from examples.tod_net_ct.training import load_task, train_task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NUMBERS = {"p1": 1, "p2": 2, "p3": 3}


def settings_of(**changes: str) -> Settings:
    tiny = {"shape": "16,32,32", "voxel_mm": "8,12,12", "patch": "0,0,0", "n_train": "1", "n_validation": "1"}
    return PRESETS["smoke"].with_overrides(tiny | {"n_test": "1", "task_networks": "unet", "task_steps": "2"} | changes)


@pytest.fixture
def lits(tmp_path) -> Path:
    """Three patients as LiTS has them: a liver of 1 with a tumour of 2 inside."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in NUMBERS.values():
        volume_hu = abdominal_phantom(number, (16, 32, 32), (8.0, 12.0, 12.0)).volume_hu.round().short()
        label = torch.zeros(16, 32, 32, dtype=torch.uint8)
        label[4:12, 8:20, 8:20] = 1
        label[6:9, 10:14, 10:14] = 2
        for name, values in (("volume", volume_hu), ("segmentation", label)):
            image = nibabel.Nifti1Image(values.numpy().transpose(2, 1, 0), np.diag([-12.0, -12.0, 8.0, 1.0]))
            nibabel.save(image, folder / f"{name}-{number}.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("organ", "count"),
    [
        ("liver", {1: 8 * 12 * 12}),
        ("tumour", {1: 3 * 4 * 4}),
        ("liver+tumour", {1: 8 * 12 * 12 - 48, 2: 48}),
        ("1,2+2", {1: 8 * 12 * 12 - 48, 2: 48}),
        ("2+1", {1: 48, 2: 8 * 12 * 12 - 48}),
    ],
)
def test_classes_are_numbered_as_they_are_named(tmp_path, lits, organ, count):
    settings = settings_of(data=str(lits), organ=organ)
    case = load_tensors(prepare(settings, tmp_path / "run") / "train-000.pt")
    assert {k: int((case["mask"] == k).sum()) for k in case["mask"].unique().tolist() if k} == count
    assert Cases(_degraded(settings, tmp_path / "run"), "train").class_names == organ.split("+")


def _degraded(settings: Settings, run: Path) -> Path:
    degrade(settings, run)
    return run


def test_names_need_a_data_set_that_knows_them(tmp_path, lits):
    for number in NUMBERS.values():
        (lits / f"volume-{number}.nii.gz").rename(lits / f"case{number}.nii.gz")
        (lits / f"segmentation-{number}.nii.gz").rename(lits / f"case{number}_mask.nii.gz")
    with pytest.raises(ValueError, match=r"says what its labels are.*--set organ=1,2\+2"):
        prepare(settings_of(data=str(lits), organ="liver+tumour"), tmp_path / "run")


def test_an_unknown_class_is_told_before_anything_is_read(tmp_path, lits):
    with pytest.raises(ValueError, match=r"labels liver \(1, 2\); tumour \(2\), got the organ 'vein'"):
        prepare(settings_of(data=str(lits), organ="liver+vein"), tmp_path / "run")


@pytest.mark.parametrize("organ", ["tumour+liver", "liver+liver", "2+1,2"])
def test_a_class_that_a_later_one_covers_is_refused(tmp_path, lits, organ):
    with pytest.raises(ValueError, match=r"every class to show, got '.*' covered .* --set organ=liver\+tumour"):
        prepare(settings_of(data=str(lits), organ=organ), tmp_path / "run")


def test_a_network_of_two_classes_is_trained_kept_and_judged_by_class(tmp_path):
    settings = settings_of(organ="liver+tumour", denoisers="mse")
    prepare(settings, tmp_path)
    degrade(settings, tmp_path)
    train_task("unet", settings, tmp_path)
    network = load_task(settings, tmp_path, "unet")
    assert network.facts["class_names"] == ["liver", "tumour"]
    assert network(torch.rand(1, 1, 16, 32, 32)).shape == (1, 3, 16, 32, 32)

    class Knows(torch.nn.Module):
        """Finds the liver as it is and half of the tumour."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            found = truth.clone()
            found[tuple(axis[: len(axis) // 2] for axis in tumour)] = 0
            return torch.nn.functional.one_hot(found.long(), 3).movedim(-1, 0)[None].float()

    cases = Cases(tmp_path, "test")
    truth = cases.in_hu(0)[2]
    truth[2:4, 10:12, 10:12] = 2  # a phantom may be without a tumour
    tumour = (truth == 2).nonzero(as_tuple=True)
    cases.in_hu = lambda number: (*Cases.in_hu(cases, number)[:2], truth)
    row = measure_case(cases, 0, settings, {"none": lambda hu: hu}, {"unet": Knows()}, torch.device("cpu"))[0]
    n, kept = len(tumour[0]), len(tumour[0]) - len(tumour[0]) // 2
    assert row["unet_dice_liver"] == pytest.approx(100)
    assert row["unet_dice_tumour"] == pytest.approx(100 * 2 * kept / (n + kept))
    assert row["unet_dice"] == pytest.approx((row["unet_dice_liver"] + row["unet_dice_tumour"]) / 2)


def test_a_class_that_a_case_lacks_is_blank(tmp_path):
    settings = settings_of(organ="liver+tumour")
    prepare(settings, tmp_path)
    degrade(settings, tmp_path)
    cases = Cases(tmp_path, "test")
    low_hu, normal_hu, mask = cases.in_hu(0)
    cases.in_hu = lambda number: (low_hu, normal_hu, mask.clamp_max(1))
    network = torch.nn.Conv3d(1, 3, 1)
    row = measure_case(cases, 0, settings, {"none": lambda hu: hu}, {"unet": network}, torch.device("cpu"))[0]
    assert math.isnan(row["unet_dice_tumour"]) and row["unet_dice"] == pytest.approx(row["unet_dice_liver"])
