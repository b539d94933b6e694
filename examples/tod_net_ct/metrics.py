"""Image quality in HU and segmentation overlap, as the paper's tables have them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .volumes import WINDOW_HU


def image_quality(restored_hu: Tensor, normal_hu: Tensor, mask: Tensor) -> dict[str, float]:
    """RMSE (HU), PSNR (dB, peak 400 HU) and SSIM (percent) on the clipped window, whole image and ROI.

    SSIM is computed per axial slice with a Gaussian window of 1.5 pixels (Wang et al., 2004); in the ROI it is the
    mean of the SSIM map over the mask. The paper does not say how it took either.

    Shape:
        All `(D, H, W)`; the mask is the organ.
    """
    from skimage.metrics import structural_similarity

    lower, upper = WINDOW_HU
    a, b = (v.clamp(lower, upper).double().numpy() for v in (restored_hu, normal_hu))
    options = {"data_range": upper - lower, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = np.stack([structural_similarity(s, t, full=True, **options)[1] for s, t in zip(a, b, strict=True)])
    squared = (a - b) ** 2
    inside = mask.numpy() > 0
    scores = {}
    for region, where in (("roi", inside), ("whole", np.ones_like(inside))):
        rmse = math.sqrt(float(squared[where].mean())) if where.any() else math.nan
        scores[f"{region}_ssim"] = 100 * float(ssim[where].mean()) if where.any() else math.nan
        scores[f"{region}_rmse_hu"] = rmse
        scores[f"{region}_psnr_db"] = 20 * math.log10((upper - lower) / rmse) if rmse else math.inf
    return scores


def dice(prediction: Tensor, mask: Tensor) -> float:
    """Dice of two binary volumes; one if both are empty."""
    from monai.metrics import compute_dice

    overlap = compute_dice(
        prediction[None, None] > 0, mask[None, None] > 0, include_background=True, ignore_empty=False
    )
    return float(overlap)


def paired(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The mean paired difference, its 95 % t interval, and the p of the paired t and Wilcoxon signed-rank tests.

    The same cases went through both, so the tests are paired (the published code's are not).
    """
    from scipy import stats

    difference = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    result = {"mean": float(difference.mean()), "n": len(ours)}
    if len(ours) < 2 or not difference.any():
        return result | {"low": math.nan, "high": math.nan, "t_p": math.nan, "wilcoxon_p": math.nan}
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    wilcoxon = stats.wilcoxon(ours, theirs).pvalue
    return result | {
        "low": float(interval.low), "high": float(interval.high),
        "t_p": float(test.pvalue), "wilcoxon_p": float(wilcoxon),
    }  # fmt: skip
