"""Stage 5: every denoiser on every test case it never saw, in numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, gradient_maps

from .data import Cases
from .denoise import denoise_volume
from .metrics import dice, image_quality, paired
from .networks import load_denoiser
from .settings import Settings
from .stage import begin, digest, finish, is_done, progress, write_text
from .train_task import dice_loss, load_task
from .volumes import WINDOW_HU, to_unit

METRICS = ("roi_ssim", "roi_rmse_hu", "roi_psnr_db", "whole_ssim", "whole_rmse_hu", "whole_psnr_db")


def evaluate(settings: Settings, run: Path) -> Path:
    """Write ``evaluation/cases.csv`` (one row per case and image) and ``evaluation/summary.json``."""
    folder = run / "evaluation"
    denoisers = {name: run / "denoisers" / name / "best.pt" for name in settings.denoisers}
    facts = {name: digest(path) for name, path in denoisers.items()} | {"task": digest(run / "task" / "unet.pt")}
    if is_done(folder, facts):
        return folder
    begin(folder)
    unet = load_task(settings, run)
    networks = {name: load_denoiser(path) for name, path in denoisers.items()}
    cases = Cases(run, "test")
    rows: list[dict[str, Any]] = []
    for i in progress(range(len(cases)), "evaluate"):
        normal_hu, low_hu, mask = cases.in_hu(i)
        images = {"normal_dose": normal_hu, "low_dose": low_hu}
        images |= {name: denoise_volume(network, low_hu, WINDOW_HU) for name, network in networks.items()}
        for name, image in images.items():
            quality = {} if name == "normal_dose" else image_quality(image, normal_hu, mask)
            overlap = 100 * dice(segment(unet, image), mask)
            rows.append({"case": cases.paths[i].stem, "image": name, **quality, "unet_dice": overlap})
    write_text(folder / "cases.csv", _as_csv(rows))
    summary = {"means": means(rows), "paired": compare(rows), "focus": focus(settings, run)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    finish(folder, facts)
    return folder


@torch.no_grad()
def segment(network: nn.Module, volume_hu: Tensor) -> Tensor:
    """The task network's mask of a volume `(D, H, W)` in HU."""
    return network(to_unit(volume_hu)[None, None]).argmax(1)[0]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean over cases of every number, by image."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["image"] for row in rows):
        own = [row for row in rows if row["image"] == name]
        numbers = [key for key in own[0] if key not in ("case", "image")]
        result[name] = {key: sum(row[key] for row in own) / len(own) for key in numbers}
    return result


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """TOD-Net minus MSE-WGAN on the same cases, for every number."""
    by_image = {name: [r for r in rows if r["image"] == name] for name in ("tod_net", "mse_wgan")}
    if not all(by_image.values()):
        return {}
    return {
        key: paired([r[key] for r in by_image["tod_net"]], [r[key] for r in by_image["mse_wgan"]])
        for key in (*METRICS, "unet_dice")
    }


def figure_loss(unet: nn.Module) -> LossSum:
    """The losses of Fig. 2, with a perceptual one where an ImageNet network is installed."""
    from .perceptual import perceptual_loss

    losses = LossSum(mse=Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()))
    perceptual = perceptual_loss()
    if perceptual is not None:
        losses = losses + LossSum(perceptual=perceptual)
    return losses + LossSum(task=TaskOrientedLoss(unet, dice_loss()))


def focus(settings: Settings, run: Path) -> dict[str, dict[str, float]]:
    """The share of each loss's gradient energy inside the organ on the half-trained TOD-Net's test output (Fig. 2):
    mean over cases of the share and of its ratio to the organ's share of the volume, and the paired gap to the task's.
    """
    loss = figure_loss(load_task(settings, run))
    half = load_denoiser(run / "denoisers" / settings.denoisers[-1] / "half.pt")
    cases = Cases(run, "test")
    shares: dict[str, list[float]] = {name: [] for name in loss.weights}
    ratios: dict[str, list[float]] = {name: [] for name in loss.weights}
    for i in progress(range(len(cases)), "gradients at x_hat"):
        low, normal, mask = cases[i]
        if not mask.any():
            continue
        with torch.no_grad():
            x_hat = half(low[None])
        found = gradient_maps(loss, x_hat, reference=normal[None], label=mask[None]).focus(mask[None])
        for name, value in found.items():
            shares[name].append(value.share)
            ratios[name].append(value.ratio)
    result = {}
    for name in shares:
        gap = paired(shares["task"], shares[name])
        result[name] = {
            "share": sum(shares[name]) / len(shares[name]),
            "ratio": sum(ratios[name]) / len(ratios[name]),
            "task_minus_this": gap["mean"], "low": gap["low"], "high": gap["high"],
        }  # fmt: skip
    return result


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["case", "image", *METRICS, "unet_dice"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
