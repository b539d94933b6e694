"""Image quality in HU, overlap and surface distance of a segmentation, and statistics for cases that are paired."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..dose import WINDOW_HU


def image_quality(restored_hu: Tensor, normal_hu: Tensor, mask: Tensor) -> dict[str, float]:
    """RMSE (HU), PSNR (dB, peak 400 HU) and SSIM (percent) on the clipped window, whole image and ROI.

    SSIM is computed per axial slice with a Gaussian window of 1.5 pixels (Wang et al., 2004); in the ROI it is the
    mean of the SSIM map over the mask. The paper does not say how it took either. Without a mask the ROI's are NaN.

    Shape:
        All `(D, H, W)`; the mask is the organ.
    """
    from skimage.metrics import structural_similarity

    lower, upper = WINDOW_HU
    options = {"data_range": upper - lower, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    squares, similarity, voxels = (dict.fromkeys(("roi", "whole"), 0.0) for _ in range(3))
    for restored, normal, inside in zip(restored_hu, normal_hu, mask, strict=True):  # a slice at a time: bounded memory
        a, b = (v.clamp(lower, upper).double().numpy() for v in (restored, normal))
        ssim = structural_similarity(a, b, full=True, **options)[1]
        squared, roi = (a - b) ** 2, inside.numpy() > 0
        for region, where in (("roi", roi), ("whole", np.ones_like(roi))):
            squares[region] += float(squared[where].sum())
            similarity[region] += float(ssim[where].sum())
            voxels[region] += int(where.sum())
    scores = {}
    for region, n in voxels.items():
        rmse = math.sqrt(squares[region] / n) if n else math.nan
        scores[f"{region}_ssim"] = 100 * similarity[region] / n if n else math.nan
        scores[f"{region}_rmse_hu"] = rmse
        scores[f"{region}_psnr_db"] = 20 * math.log10((upper - lower) / rmse) if rmse else math.inf
    return scores


def dice(prediction: Tensor, mask: Tensor) -> float:
    """Dice of two label maps: the mean over the classes that the mask has; one if both are empty."""
    overlaps = _of_classes(prediction, mask) or {1: 1.0 if not prediction.any() else 0.0}
    return sum(overlaps.values()) / len(overlaps)


def dice_scores(prediction: Tensor, mask: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """`dice`, and beside it `dice_<name>` of each class that the mask has, where there are several.

    Args:
        prediction: `(D, H, W)`, bool or whole numbers with 0 for the background.
        mask: like `prediction`.
        class_names: of the numbers from 1 on.
    """
    scores = {"dice": dice(prediction, mask)}
    if len(class_names) > 1:
        scores |= {f"dice_{class_names[k - 1]}": value for k, value in _of_classes(prediction, mask).items()}
    return scores


def _of_classes(prediction: Tensor, mask: Tensor) -> dict[int, float]:
    from monai.metrics import compute_dice

    pairs = {int(k): (prediction == k, mask == k) for k in mask.unique().tolist() if k}
    return {
        k: float(compute_dice(found[None, None], truth[None, None], include_background=True))
        for k, (found, truth) in pairs.items()
    }


def surface_distance_mm(prediction: Tensor, mask: Tensor, voxel_mm: Sequence[float]) -> float:
    """Average symmetric surface distance in mm; NaN where one of the two volumes is empty, for there is no surface."""
    from monai.metrics import compute_average_surface_distance

    found, truth = prediction > 0, mask > 0
    if not bool(found.any()) or not bool(truth.any()):
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
        distance = compute_average_surface_distance(
            found[None, None], truth[None, None], include_background=True, symmetric=True, spacing=list(voxel_mm)
        )
    return float(distance)
