"""The classic filters in the place of a trained denoiser: their one number is picked on the validation cases."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..dose import to_unit
from ..run import Settings, begin, digest, finish, is_done, progress
from ..scans import Cases
from .recipes import FILTERS, parse, restore


def tune_filter(name: str, settings: Settings, run: Path) -> Path:
    """Pick a classic filter's strength on the validation cases, by the same rule as every network's weights."""
    folder = run / "denoisers" / name
    kind, settings = parse(name, settings)
    facts = {"denoiser": name, "low_dose": digest(run / "low_dose" / "manifest.json")}
    if is_done(folder, facts):
        return folder
    cases = Cases(run, "validation")
    errors: dict[float, float] = {}
    for sigma in progress((0.03, 0.05, 0.08, 0.12, 0.18, 0.27), f"tune {name}", 6):
        total = 0.0
        for i in range(len(cases)):
            normal_hu, low_hu, _ = cases.in_hu(i)
            found: Tensor = restore(lambda unit, s=sigma: FILTERS[kind][1](unit, s), low_hu)  # type: ignore[misc]
            total += float((to_unit(found) - to_unit(normal_hu)).square().mean())
        errors[sigma] = total / len(cases)
    begin(folder, facts)
    best = min(errors, key=errors.__getitem__)
    finish(folder, facts, sigma=best, validation_mse={str(sigma): error for sigma, error in errors.items()})
    return folder
