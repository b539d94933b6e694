"""Laws of the phantoms: the seed alone decides the patient, the grid only how finely it is seen."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from examples.tod_net_ct.scans import abdominal_phantom, organ_mask
from examples.tod_net_ct.scans.phantoms import ORGANS, Phantom

COARSE = {"shape": (16, 64, 64), "voxel_mm": (10.0, 6.0, 6.0)}
FINE = {"shape": (32, 96, 96), "voxel_mm": (5.0, 4.0, 4.0)}


@pytest.fixture(scope="module")
def patients() -> list[Phantom]:
    return [abdominal_phantom(seed, **COARSE) for seed in range(12)]


def core(mask: Tensor) -> Tensor:
    """Voxels whose eight neighbours in the slice belong to the mask too."""
    return -torch.nn.functional.max_pool2d(-mask[:, None].float(), 3, 1, 1)[:, 0] > 0


def test_a_seed_is_a_patient_and_the_global_random_state_stays(patients):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = abdominal_phantom(3, **COARSE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.volume_hu, patients[3].volume_hu)
    assert torch.equal(again.label, patients[3].label)
    for a, b in zip(patients, patients[1:], strict=False):
        assert (a.label != b.label).float().mean() > 0.02


def test_shapes_types_and_range(patients):
    for patient in patients:
        assert patient.volume_hu.shape == patient.label.shape == (16, 64, 64)
        assert (patient.volume_hu.dtype, patient.label.dtype) == (torch.float32, torch.uint8)
        assert -1001 < patient.volume_hu.min() < -990
        assert 100 < patient.volume_hu.max() < 800
        assert patient.label.max() <= max(ORGANS.values())


def test_every_organ_turns_up_and_the_task_organs_in_every_patient(patients):
    seen = [set(patient.label.unique().tolist()) for patient in patients]
    assert set.union(*seen) == set(ORGANS.values())
    for ids in seen:
        assert {ORGANS[name] for name in ("background", "liver", "kidney", "spleen", "vessel", "bone")} <= ids
    for name in ("tumour", "kidney_tumour"):
        assert 0 < sum(ORGANS[name] in ids for ids in seen) < len(seen)


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [("liver", 40, 80), ("kidney", 20, 185), ("spleen", 38, 84), ("lung", -890, -700), ("gallbladder", -5, 30)],
)
def test_organs_have_the_documented_hounsfield_units(patients, organ, low, high):
    for patient in patients:
        inside = core(patient.label == ORGANS[organ])
        if inside.sum() > 20:
            assert low < patient.volume_hu[inside].median() < high


def test_the_liver_is_hard_to_tell_from_its_neighbours_but_not_hopeless(patients):
    contrast = []
    for patient in patients:
        liver, *others = (
            patient.volume_hu[core(patient.label == ORGANS[name])] for name in ("liver", "spleen", "pancreas")
        )
        contrast += [float((other.median() - liver.median()).abs()) for other in others if len(other) > 20]
        assert liver.std() < 20
    assert max(contrast) < 35
    assert sum(contrast) / len(contrast) < 20


def test_task_masks_include_the_tumours(patients):
    for patient in patients:
        for organ, tumour in (("liver", "tumour"), ("kidney", "kidney_tumour")):
            mask = organ_mask(patient.label, organ)
            parts = [organ_mask(patient.label, tumour), patient.label == ORGANS[organ]]
            assert mask.dtype == torch.bool
            assert torch.equal(mask, parts[0] | parts[1])
            assert not bool((parts[0] & parts[1]).any())


def test_the_liver_fills_a_plausible_part_of_the_slab(patients):
    litres = [float(organ_mask(patient.label, "liver").sum()) * 0.36 / 1000 for patient in patients]
    assert min(litres) > 0.4
    assert max(litres) < 2.6
    assert max(litres) > 1.3 * min(litres)


def test_a_finer_grid_shows_the_same_anatomy(patients):
    for seed, patient in enumerate(patients[:3]):
        fine = abdominal_phantom(seed, **FINE)
        for organ, tolerance in (("liver", 0.03), ("kidney", 0.06), ("spleen", 0.06)):
            volume = [
                float(organ_mask(p.label, organ).sum() * v) for p, v in ((patient, 10 * 6 * 6), (fine, 5 * 4 * 4))
            ]
            assert abs(volume[0] / volume[1] - 1) < tolerance, (seed, organ)
        mask = organ_mask(patient.label, "liver")
        resampled = torch.nn.functional.interpolate(
            organ_mask(fine.label, "liver")[None, None].float(), size=mask.shape, mode="trilinear"
        )[0, 0]
        assert 2 * (mask & (resampled > 0.5)).sum() / (mask.sum() + (resampled > 0.5).sum()) > 0.95


def test_a_smaller_slab_is_a_part_of_the_larger(patients):
    middle = abdominal_phantom(0, shape=(8, 64, 64), voxel_mm=COARSE["voxel_mm"])
    assert torch.equal(middle.label, patients[0].label[4:12])
    torch.testing.assert_close(middle.volume_hu, patients[0].volume_hu[4:12], rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: abdominal_phantom(0, shape=(16, 64)),
            "abdominal_phantom: shape must be three positive numbers, got (16, 64); pass (D, H, W)",
        ),
        (
            lambda: abdominal_phantom(0, voxel_mm=(5.0, 0.0, 4.0)),
            "abdominal_phantom: voxel_mm must be three positive numbers, got (5.0, 0.0, 4.0); pass (dz, dy, dx)",
        ),
        (
            lambda: organ_mask(torch.zeros(2, 2), "heart"),
            "organ_mask: organ must be one of background, liver, tumour, kidney, kidney_tumour, spleen, pancreas, "
            "stomach, bowel, gallbladder, vessel, bone, lung, got 'heart'; pass 'liver'",
        ),
    ],
    ids=["shape", "voxel", "organ"],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
