"""Which dose is the paper's? The number of photons at which the U-Net loses as much Dice as in the paper's Table 2."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from torch import Tensor, nn

from ..dose import WINDOW_HU, case_seed, check, numbered_cases, simulate_volume, voxel_of
from ..evaluation import device_of
from ..inference import segment
from ..metrics import dice
from ..run import Dose, Seed, Settings, decisive, load_tensors, only, write_text
from ..training import load_task

BRACKET_PHOTONS = (1e3, 1e6)
NETWORK = "unet"
Case = tuple[int, Path]  # the number that seeds its noise, and its file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``calibrate-dose``."""
    parser.add_argument(
        "--drop", type=float, default=5.5, help="points of Dice lost (default: 5.5, LiTS in the paper; KiTS: 15.6)"
    )


def calibrate(
    settings: Settings,
    run: Path,
    drop: float = 5.5,
    bracket_photons: tuple[float, float] = BRACKET_PHOTONS,
    tolerance: float = 0.1,
    n_steps: int = 12,
) -> Path:
    """Find by bisection the photons at which the U-Net's mean Dice on the validation cases falls by `drop` points.

    Every trial draws its noise from the same seeds, as normal numbers in place of Poisson's, so that the curve is
    smooth; the answer is then tried with the stage's own noise. Nothing else in the run is changed: phantoms whose
    normal dose is noisy keep it, and the share of it that is left (``dose_fraction``) is what is sought. Where even
    an end of the bracket loses too little or too much, a sentence says so.

    Args:
        settings: Of the run; all but ``i0_photons`` is kept.
        run: A folder with ``cases`` and a trained ``task/unet``.
        drop: Points of Dice, in percent.
        bracket_photons: Least and most photons to try.
        tolerance: Points of Dice within which a trial has arrived.
        n_steps: Most bisections.

    Returns:
        ``calibration.json``: the Dice on normal dose and, of every dose tried, the Dice, the points lost, and the RMSE
        in HU of the whole image and of the organ within the window, each a mean over cases; ``i0_photons`` is the
        answer, the low dose's photons, null where no dose has that loss.

    Raises:
        ValueError: for a run without labelled validation cases, or without its U-Net.
    """
    check(settings, run)
    if not 0 < drop < 100:
        raise ValueError(f"--drop: expected points of Dice above 0, got {drop:g}; for example --drop 5.5")
    if not (run / "task" / NETWORK / "weights.pt").is_file():
        raise ValueError(f"{run}: holds no trained {NETWORK}; run train-task first")
    cases = _labelled(run)
    network = load_task(settings, run, NETWORK).to(device_of(settings))
    normal = 100 * mean(_dice(network, case["normal_hu"], case, settings) for case in map(_load, cases))
    print(f"normal dose: Dice {normal:.2f} on {len(cases)} cases")
    trials: dict[float, dict[str, float]] = {}

    def lost(i0_photons: float) -> float:
        trials[i0_photons] = _trial(network, cases, normal, i0_photons, _smooth(settings, i0_photons))
        print(_line(trials[i0_photons]))
        return trials[i0_photons]["dice_lost"]

    few, many = _within_normal(settings, bracket_photons)
    found, as_simulated = None, None
    if (most := lost(few)) < drop:
        said = f"even {few:.0f} photons cost only {most:.2f} points of Dice, not {drop:g}; no dose in reach is so low"
    elif (least := lost(many)) > drop:
        said = (
            f"even {many:.0f} photons cost {least:.2f} points of Dice, more than {drop:g}; no dose in reach is so high"
        )
    else:
        for _ in range(n_steps):
            middle = math.sqrt(few * many)
            gap = lost(middle) - drop
            few, many = (middle, many) if gap > 0 else (few, middle)
            if abs(gap) <= tolerance:
                break
        found = min(trials, key=lambda i0: abs(trials[i0]["dice_lost"] - drop))
        as_simulated = _trial(network, cases, normal, found, _at(settings, found))
        said = f"with the noise of simulate, {_option(settings, found)} means {_line(as_simulated)}"
    print(said)
    kept = {name: value for name, value in decisive(only(settings, Seed, Dose)).items() if name != "i0_photons"}
    result: dict[str, Any] = {
        "i0_photons": found,
        "said": said,
        "drop": drop,
        "normal_dice": normal,
        "n_cases": len(cases),
    }
    result |= {"as_simulated": as_simulated}
    result |= {"settings": kept}
    result |= {"trials": [trials[i0] for i0 in sorted(trials)]}
    write_text(run / "calibration.json", json.dumps(result, indent=2))
    return run / "calibration.json"


def _normal_is_noisy(settings: Settings) -> bool:
    """Whether phantoms have the noise of `i0_photons` at normal dose, so that low dose can only be a part of it."""
    return settings.dose_fraction > 0 and not settings.data


def _within_normal(settings: Settings, bracket_photons: tuple[float, float]) -> tuple[float, float]:
    """The bracket, below the normal dose where that is given."""
    few, many = bracket_photons
    if not _normal_is_noisy(settings):
        return few, many
    return min(few, settings.i0_photons / 100), min(many, settings.i0_photons)


def _option(settings: Settings, photons: float) -> str:
    """What to type for a low dose of so many photons."""
    if _normal_is_noisy(settings):
        return f"--set dose_fraction={photons / settings.i0_photons:.3g}"
    return f"--set i0_photons={photons:.0f}"


def _at(settings: Settings, photons: float) -> Settings:
    """The settings of a low dose of so many photons."""
    if _normal_is_noisy(settings):
        return replace(settings, dose_fraction=photons / settings.i0_photons)
    return replace(settings, i0_photons=photons)


def _smooth(settings: Settings, i0_photons: float) -> Settings:
    """The same dose as a vanishing part of a vast one, which adds normal numbers: they scale with the dose, where
    Poisson's are drawn anew."""
    if settings.dose_fraction or settings.route != "fast":
        return _at(settings, i0_photons)
    return replace(settings, i0_photons=1e6 * i0_photons, dose_fraction=1e-6)


def _trial(
    network: nn.Module, cases: list[Case], normal_dice: float, i0_photons: float, settings: Settings
) -> dict[str, float]:
    """Dice (percent) and RMSE (HU) at the settings' dose, means over the cases."""
    scores = []
    for number, path in cases:
        case = load_tensors(path)
        seed = case_seed(settings, number)
        low_hu = simulate_volume(case["normal_hu"], voxel_of(case), settings, seed)["low_hu"]
        squared = (low_hu.float().clamp(*WINDOW_HU) - case["normal_hu"].float().clamp(*WINDOW_HU)).square()
        scores.append({
            "dice": 100 * _dice(network, low_hu, case, settings),
            "whole_rmse_hu": math.sqrt(squared.mean()),
            "roi_rmse_hu": math.sqrt(squared[case["mask"] > 0].mean()),
        })  # fmt: skip
    means = {name: mean(score[name] for score in scores) for name in scores[0]}
    return {"i0_photons": i0_photons, "dice_lost": normal_dice - means["dice"], **means}


def _line(trial: dict[str, float]) -> str:
    return (
        "{i0_photons:.0f} photons: Dice {dice:.2f}, {dice_lost:.2f} points lost; "
        "RMSE {whole_rmse_hu:.1f} HU, {roi_rmse_hu:.1f} HU in the organ".format(**trial)
    )


def _dice(network: nn.Module, volume_hu: Tensor, case: dict[str, Tensor], settings: Settings) -> float:
    found = segment(network, volume_hu.float(), voxel_of(case), settings.voxel_mm, device=device_of(settings))
    return dice(found, case["mask"])


def _load(case: Case) -> dict[str, Tensor]:
    return load_tensors(case[1])


def _labelled(run: Path) -> list[Case]:
    """Validation cases with an organ, but for measured pairs, whose dose is what it is."""
    cases = []
    for number, path in numbered_cases(run):
        if path.stem.startswith("validation-"):
            case = load_tensors(path)
            if "low_hu" not in case and case["mask"].any():
                cases.append((number, path))
    if not cases:
        raise ValueError(f"{run}: no validation case has a mask to calibrate by; prepare with --set n_validation=...")
    return cases
