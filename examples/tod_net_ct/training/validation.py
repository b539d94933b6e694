"""The rule that picks every denoiser's weights: its error, or a guide's Dice, on the whole validation volumes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..dose import WINDOW_HU, to_unit
from ..inference import denoise_volume, segment
from ..metrics import dice
from ..networks import Denoiser
from ..run import Settings
from ..scans import Cases
from .recipes import restore, slide
from .task_network import load_task


@torch.no_grad()
def validate(network: nn.Module, settings: Settings, run: Path, device: torch.device) -> dict[str, float]:
    """Mean squared error on the whole validation volumes (the rule that picks every denoiser's weights), and the
    first guide's Dice where that is the rule.
    """
    network.eval()
    cases = Cases(run, "validation")
    judge = load_task(settings, run, settings.guides[0]).to(device) if settings.select_best == "dice" else None
    errors, overlaps = [], []
    for i in range(len(cases)):
        normal_hu, low_hu, mask = cases.in_hu(i)
        if isinstance(network, Denoiser):
            restored_hu = denoise_volume(network, low_hu, WINDOW_HU, device=device)
        else:
            restored_hu = restore(lambda unit: slide(network, unit, settings.seen_shape, device), low_hu)
        errors.append(float((to_unit(restored_hu) - to_unit(normal_hu)).square().mean()))
        if judge is not None:
            voxel_mm = cases.voxel_mm_of(i)
            found = segment(judge, restored_hu, voxel_mm, settings.voxel_mm, device=device)
            overlaps.append(dice(found, mask))
    network.train()
    scores = {"mse": sum(errors) / len(errors)}
    return scores | ({"dice": sum(overlaps) / len(overlaps)} if overlaps else {})
