"""Stage 5: every denoiser on every test case, judged by image quality and by every task network, in numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, gradient_maps

from ..dose import to_unit
from ..inference import segment
from ..metrics import dice_scores, holm, image_quality, mean_and_sd, paired, surface_distance_mm
from ..networks import load_denoiser
from ..run import (
    Guidance,
    Networks,
    Patches,
    Settings,
    TaskLoss,
    begin,
    decisive,
    digest,
    finish,
    is_done,
    only,
    progress,
    read_json,
    write_text,
)
from ..scans import Cases
from ..training import RECIPES, dice_loss, folder_of, load_task, restorer

Row = dict[str, Any]
Restorer = Callable[[Tensor], Tensor]

REFERENCE = "tod_net"
ORACLE = "oracle"  # in place of a denoiser: low dose as it came, before the same task network trained on low dose
QUALITY = ("roi_ssim", "roi_rmse_hu", "roi_psnr_db", "whole_ssim", "whole_rmse_hu", "whole_psnr_db")
LOWER_IS_BETTER = ("_rmse_hu", "_surface_mm")  # endings


def evaluate(settings: Settings, run: Path) -> Path:
    """Write ``evaluation/cases.csv`` and ``evaluation/summary.json``.

    A row of the first is one case at one dose through one denoiser ("none" for the image as it came): quality against
    normal dose, then Dice (percent) and average symmetric surface distance (mm) of every task network. Blank is what
    cannot be measured: the ROI and the segmentation of a case without a mask. A killed evaluation resumes at the case.
    """
    folder = run / "evaluation"
    trained_on_low = replace(settings, task_dose="low")
    facts = {
        "cases": _fingerprint(run / "cases"),
        "low_dose": _fingerprint(run / "low_dose"),
        **decisive(only(settings, Patches, TaskLoss, Guidance, Networks)),
        "denoisers": {name: _fingerprint(run / "denoisers" / name, "best.pt") for name in settings.denoisers},
        "networks": {name: _fingerprint(run / "task" / name, "weights.pt") for name in settings.task_networks},
    }
    if settings.oracles:
        folders = {name: folder_of(name, trained_on_low, run) for name in settings.oracles}
        facts["oracles"] = {name: _fingerprint(made, "weights.pt") for name, made in folders.items()}
    if is_done(folder, facts):
        return folder
    done = folder / "unfinished"
    if not begin(folder, facts):
        shutil.rmtree(done, ignore_errors=True)
    device = device_of(settings)
    networks = judges(settings, run, device)
    oracles = {name: load_task(trained_on_low, run, name).to(device) for name in settings.oracles}
    restorers: dict[str, Restorer] = {"none": lambda volume_hu: volume_hu}
    restorers |= {name: restorer(name, settings, run, device) for name in settings.denoisers}
    cases = Cases(run, "test")
    rows: list[Row] = []
    for i in progress(range(len(cases)), "evaluate"):
        path = done / f"{cases.paths[i].stem}.json"
        own = _kept(path)
        if own is None:
            own = measure_case(cases, i, settings, restorers, networks, device, oracles)
            write_text(path, json.dumps(own))
        rows += own
    write_text(folder / "cases.csv", _as_csv(rows))
    summary = {
        "n_cases": len(cases),
        "n_labelled": len({row["case"] for row in rows if math.isfinite(row[f"{settings.task_networks[0]}_dice"])}),
        "means": means(rows),
        "comparisons": comparisons(rows, settings.denoisers, settings.task_networks),
        "focus": focus(settings, run),
    }
    write_text(folder / "summary.json", json.dumps(_finite(summary), indent=2))
    finish(folder, facts, n_cases=len(cases))
    shutil.rmtree(done, ignore_errors=True)
    return folder


def judges(settings: Settings, run: Path, device: torch.device) -> dict[str, nn.Module]:
    """Every task network, in the layout in which 3-D convolutions run fastest."""
    layout = torch.channels_last_3d
    return {n: load_task(settings, run, n).to(device).to(memory_format=layout) for n in settings.task_networks}


def device_of(settings: Settings) -> torch.device:
    """Where this run's networks work."""
    on_gpu = settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def measure_case(
    cases: Cases,
    index: int,
    settings: Settings,
    restorers: dict[str, Restorer],
    networks: dict[str, nn.Module],
    device: torch.device,
    oracles: Mapping[str, nn.Module] | None = None,
) -> list[Row]:
    """The rows of one case: both doses through every restorer, judged by every network; low dose as it came, judged by
    those that were trained on it.
    """
    normal_hu, low_hu, mask = cases.in_hu(index)
    voxel_mm = cases.voxel_mm_of(index)
    blank: Row = dict.fromkeys((*QUALITY, *_columns_of(networks, cases.class_names)), math.nan)

    def judged(image: Tensor, by: Mapping[str, nn.Module]) -> Row:
        row: Row = {}
        for name, network in by.items() if mask.any() else ():
            found = segment(network, image, voxel_mm, settings.voxel_mm, device=device)
            overlaps = dice_scores(found, mask, cases.class_names)
            row |= {f"{name}_{what}": 100 * value for what, value in overlaps.items()}
            row[f"{name}_surface_mm"] = surface_distance_mm(found, mask, voxel_mm)
        return row

    rows = []
    for dose, given_hu in (("low", low_hu), ("normal", normal_hu)):
        for denoiser, restore in restorers.items():
            image = restore(given_hu)
            row: Row = {"case": cases.paths[index].stem, "dose": dose, "denoiser": denoiser} | blank
            if (dose, denoiser) != ("normal", "none"):
                row |= image_quality(image, normal_hu, mask)
            rows.append(row | judged(image, networks))
    if oracles:
        row = {"case": cases.paths[index].stem, "dose": "low", "denoiser": ORACLE}
        rows.append(row | blank | judged(low_hu, oracles))
    return rows


def _columns_of(networks: Iterable[str], class_names: Sequence[str]) -> list[str]:
    own = [f"dice_{name}" for name in class_names] if len(class_names) > 1 else []
    return [f"{name}_{what}" for name in networks for what in ("dice", *own, "surface_mm")]


def _kept(path: Path) -> list[Row] | None:
    """A case's rows from a killed evaluation; None where there are none that can be used."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(rows, list) and rows and all(isinstance(row, dict) and "case" in row for row in rows)
    return rows if whole else None


def read_summary(run: Path) -> dict[str, Any]:
    """What ``evaluation/summary.json`` holds.

    Raises:
        ValueError: the file is missing, damaged, or lacks a part.
    """
    path = run / "evaluation" / "summary.json"
    mend = f"remove the folder {path.parent} and run evaluate again"
    summary = read_json(path, mend)
    for part, kind in {"n_cases": int, "means": dict, "comparisons": list, "focus": dict}.items():
        if not isinstance(summary.get(part), kind):
            raise ValueError(f"{path}: expected the summary of an evaluation, got one without {part!r}; {mend}")
    return summary


def read_rows(run: Path) -> list[Row]:
    """The rows of ``evaluation/cases.csv``; NaN for a blank."""
    path = run / "evaluation" / "cases.csv"
    mend = f"remove the folder {path.parent} and run evaluate again"
    try:
        with path.open(encoding="utf-8") as file:
            rows = [
                {k: v if k in ("case", "dose", "denoiser") else float(v or "nan") for k, v in row.items()}
                for row in csv.DictReader(file)
            ]
        whole = all(row["case"] and row["dose"] and row["denoiser"] for row in rows)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, csv.Error) as error:  # no file, number, or text
        raise ValueError(f"{path}: expected the rows of an evaluation, got a damaged file; {mend}") from error
    if not rows or not whole:
        raise ValueError(f"{path}: expected the rows of an evaluation, got none; {mend}")
    return rows


def values_of(rows: Sequence[Row], dose: str, denoiser: str, key: str) -> list[float]:
    """One number of every case, in the order of the cases."""
    return [row[key] for row in rows if (row["dose"], row["denoiser"]) == (dose, denoiser)]


def means(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Mean, standard deviation and count over cases, by dose, denoiser and number."""
    numbers = [key for key in rows[0] if key not in ("case", "dose", "denoiser")]
    result: dict[str, Any] = {}
    for dose, denoiser in dict.fromkeys((row["dose"], row["denoiser"]) for row in rows):
        found = {key: mean_and_sd(values_of(rows, dose, denoiser, key)) for key in numbers}
        result.setdefault(dose, {})[denoiser] = found
    return result


def comparisons(rows: Sequence[Row], denoisers: Sequence[str], networks: Sequence[str]) -> list[Row]:
    """Paired differences on the same cases, with Holm's correction over each table.

    On low dose the reference denoiser (TOD-Net) is compared with every other and with none; on normal dose every
    denoiser is compared with none. **The family is one table**: all its comparisons in all its columns; the t tests
    and the Wilcoxon tests are corrected apart, since they are two readings of one question.
    """
    against: list[tuple[str, str]] = []
    if REFERENCE in denoisers:
        against = [(REFERENCE, other) for other in ("none", *denoisers) if other != REFERENCE]
    with_none = [(name, "none") for name in denoisers]
    overlap, distance = ([f"{name}_{what}" for name in networks] for what in ("dice", "surface_mm"))
    families = {
        "table1": ("low", against, QUALITY),
        "table2": ("low", against, overlap),
        "table3": ("normal", with_none, overlap),
        "table2_surface": ("low", against, distance),
        "table3_surface": ("normal", with_none, distance),
    }
    result = []
    for table, (dose, pairs, keys) in families.items():
        family: list[Row] = []
        for ours, theirs in pairs:
            for key in keys:
                gap = paired(values_of(rows, dose, ours, key), values_of(rows, dose, theirs, key))
                sign = -1 if key.endswith(LOWER_IS_BETTER) else 1
                family.append(
                    {"table": table, "dose": dose, "ours": ours, "theirs": theirs, "key": key, **gap}
                    | {"better": sign * gap["mean"] > 0}
                )
        for test in ("t", "wilcoxon"):
            for gap, p in zip(family, holm([gap[f"{test}_p"] for gap in family]), strict=True):
                gap |= {f"{test}_holm": p, "family": len(family)}
        result += family
    return result


def figure_loss(settings: Settings, run: Path) -> LossSum:
    """The losses of Fig. 2, with a perceptual one where an ImageNet network is installed."""
    from ..networks import perceptual_loss

    losses = LossSum(mse=Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()))
    perceptual = perceptual_loss(settings.perceptual_network)
    if perceptual is not None:
        losses = losses + LossSum(perceptual=perceptual)
    task = TaskOrientedLoss(load_task(settings, run, guide_of(settings)), dice_loss(settings.dice))
    return (losses + LossSum(task=task)).to(device_of(settings))


def guide_of(settings: Settings) -> str:
    """The task network of Fig. 2 and of the pictures: the first that guides TOD-Net."""
    return next(iter(settings.guides), settings.task_networks[0])


def half_trained(settings: Settings, run: Path) -> nn.Module | None:
    """TOD-Net halfway through its training, or one of the same network in its place; None if there is neither."""
    kinds = {name: RECIPES.get(name.partition("@")[0]) for name in settings.denoisers}
    names = [name for name, kind in kinds.items() if kind is not None and kind.network == "tod_net"]
    names.sort(key=lambda name: name != REFERENCE)
    paths = [run / "denoisers" / name / "half.pt" for name in names]
    path = next((path for path in paths if path.exists()), None)
    return None if path is None else load_denoiser(path).to(device_of(settings))


def training_view(cases: Cases, index: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Low dose and normal dose in [0, 1] and the mask as training saw such a case: on the training's voxel size, one
    sub-volume, here around the organ. All `(1, 1, D, H, W)`.
    """
    normal_hu, low_hu, mask = cases.in_hu(index)
    voxel_mm = cases.voxel_mm_of(index)
    size = [max(1, round(n * a / b)) for n, a, b in zip(mask.shape, voxel_mm, settings.voxel_mm, strict=True)]
    volumes = [volume.float()[None, None] for volume in (low_hu, normal_hu, mask)]
    if size != list(mask.shape):
        modes = ("trilinear", "trilinear", "nearest-exact")
        volumes = [F.interpolate(v, size=size, mode=mode) for v, mode in zip(volumes, modes, strict=True)]
    organ = volumes[2][0, 0].nonzero().float()
    centre = organ.mean(0).tolist() if len(organ) else [n / 2 for n in size]
    cut = [slice(None), slice(None)]
    for n, want, middle in zip(size, settings.shape, centre, strict=True):
        start = min(max(0, round(middle - want / 2)), max(0, n - want))
        cut.append(slice(start, start + want))
    low, normal, organ_mask = (volume[tuple(cut)] for volume in volumes)
    padding = [p for have, want in zip(low.shape[:1:-1], settings.shape[::-1], strict=True) for p in (0, want - have)]
    low, normal = (F.pad(to_unit(v), padding) for v in (low, normal))  # with air, as in training
    return low, normal, F.pad(organ_mask, padding).to(torch.uint8)


def focus(settings: Settings, run: Path) -> dict[str, dict[str, float]]:
    """The share of each loss's gradient energy inside the organ on the half-trained TOD-Net's test output (Fig. 2):
    mean over cases of the share and of its ratio to the organ's share of the volume, and the paired gap to the task's.
    """
    half, device = half_trained(settings, run), device_of(settings)
    if half is None:
        return {}
    loss = figure_loss(settings, run)
    cases = Cases(run, "test")
    shares: dict[str, list[float]] = {name: [] for name in loss.weights}
    ratios: dict[str, list[float]] = {name: [] for name in loss.weights}
    for i in progress(range(len(cases)), "gradients at x_hat"):
        low, normal, mask = (volume.to(device) for volume in training_view(cases, i, settings))
        if not mask.any():
            continue
        with torch.no_grad():
            x_hat = half(low)
        found = gradient_maps(loss, x_hat, reference=normal, label=mask).focus(mask > 0)
        for name, value in found.items():
            shares[name].append(value.share)
            ratios[name].append(value.ratio)
    result = {}
    for name in shares if shares["task"] else ():
        gap = paired(shares["task"], shares[name])
        result[name] = {
            "share": sum(shares[name]) / len(shares[name]),
            "ratio": sum(ratios[name]) / len(ratios[name]),
            "task_minus_this": gap["mean"], "low": gap["low"], "high": gap["high"],
        }  # fmt: skip
    return result


def _fingerprint(made: Path, weights: str = "") -> str:
    """A trained network is its weights; anything else, a classic filter too, what its stage's manifest tells."""
    path = made / weights if weights and (made / weights).exists() else made / "manifest.json"
    if not path.exists():
        raise ValueError(f"{made}: expected a finished stage, got none; run the stages before evaluate first")
    return digest(path)


def _as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()


def _finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
