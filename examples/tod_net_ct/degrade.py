"""Stage 2: the low-dose counterpart of every prepared case."""

from __future__ import annotations

from pathlib import Path

import torch

from .projector import ParallelBeam
from .settings import Settings
from .simulate import low_dose
from .stage import begin, finish, is_done, load_tensors, progress, save_tensors


def degrade(settings: Settings, run: Path) -> Path:
    """Write ``low_dose/<case>.pt`` with ``low_hu`` (int16); each case draws its noise from its own seed."""
    folder, cases = run / "low_dose", run / "cases"
    names = ("seed", "i0_photons", "electronic_noise_photons", "kernel", "n_views", "voxel_mm")
    facts = {name: getattr(settings, name) for name in names} | {"cases": (cases / "manifest.json").read_text()}
    if is_done(folder, facts):
        return folder
    begin(folder)
    paths = sorted(cases.glob("*.pt"))
    beam = ParallelBeam(settings.shape[1:], settings.n_views, settings.voxel_mm[2])  # one geometry for all cases
    n_clamped = n_rays = 0
    for number, path in enumerate(progress(paths, "simulate low dose")):
        normal_hu = load_tensors(path)["normal_hu"].float()
        result = low_dose(
            normal_hu,
            settings.voxel_mm,
            settings.i0_photons,
            generator=1_000_003 * (settings.seed + 1) + number,
            electronic_noise_photons=settings.electronic_noise_photons,
            kernel=settings.kernel,
            beam=beam,
        )
        low_hu = result.volume_hu.round().clamp(-32768, 32767).to(torch.int16)
        save_tensors(folder / path.name, low_hu=low_hu)
        n_clamped, n_rays = n_clamped + result.n_clamped, n_rays + result.n_rays
    finish(folder, facts, n_clamped=n_clamped, n_rays=n_rays)
    return folder
