"""What several rooms' tests take in the place of a network and of a run."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from torch import nn

from examples.tod_net_ct.evaluation import LOWER_IS_BETTER, QUALITY, scores


class Bright(nn.Module):
    """A task network that finds what is brighter than 0 HU, and demands sides that divide by 16."""

    def forward(self, image):
        assert all(side % 16 == 0 for side in image.shape[2:])
        return torch.cat([torch.full_like(image, 0.5), image], dim=1)


def made_up_rows(n: int = 12, networks=("unet", "vnet")) -> list[dict]:
    """Twelve cases where TOD-Net beats MSE-WGAN by 1 (with little scatter) wherever higher is better."""
    rng = np.random.default_rng(1)
    rows = []
    for case in range(n):
        base = rng.normal(80, 5)
        for dose, level in (("low", 0.0), ("normal", 5.0)):
            for denoiser, gain in (("none", -6.0), ("mse_wgan", 0.0), ("tod_net", 1.0)):
                row = {"case": f"test-{case:03d}", "dose": dose, "denoiser": denoiser}
                for key in QUALITY + tuple(f"{name}_{what}" for name in networks for what in ("dice", "surface_mm")):
                    sign = -1 if key.endswith(LOWER_IS_BETTER) else 1
                    row[key] = base + level + sign * (gain + rng.normal(0, 0.1))
                    if (dose, denoiser) == ("normal", "none") and key in QUALITY:
                        row[key] = math.nan
                rows.append(row)
    return rows


def made_up_summary() -> dict:
    """What the evaluation sums up of `made_up_rows`, as a reader of its JSON gets it."""
    rows = made_up_rows()
    found = scores.comparisons(rows, ("mse_wgan", "tod_net"), ("unet", "vnet"))
    content = {"n_cases": 12, "n_labelled": 12, "means": scores.means(rows), "comparisons": found, "focus": {}}
    return json.loads(json.dumps(scores._finite(content), allow_nan=False))
