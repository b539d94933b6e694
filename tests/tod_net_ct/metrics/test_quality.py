"""Image quality and segmentation scores by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from examples.tod_net_ct.metrics import image_quality, surface_distance_mm

pytest.importorskip("skimage")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
