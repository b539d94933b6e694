"""Stage 6: the table, Fig. 2, a case side by side, and one page that holds them."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taskloss import gradient_maps, plot_gradient_maps

from .data import Cases
from .denoise import denoise_volume
from .evaluate import figure_loss, segment
from .networks import load_denoiser
from .settings import Settings
from .stage import write_text
from .train_task import load_task
from .volumes import WINDOW_HU, replacing, to_unit

TITLES = {
    "normal_dose": "Normal dose",
    "low_dose": "No denoiser",
    "mse_wgan": "MSE-WGAN",
    "tod_net": "TOD-Net",
    "mse": "MSE",
    "l1": "L1",
    "perceptual": "perceptual",
    "task": "task",
    "adv": "adversarial",
}
HEADINGS = {
    "roi_ssim": "ROI SSIM (%)",
    "roi_rmse_hu": "ROI RMSE (HU)",
    "roi_psnr_db": "ROI PSNR (dB)",
    "whole_ssim": "SSIM (%)",
    "whole_rmse_hu": "RMSE (HU)",
    "whole_psnr_db": "PSNR (dB)",
    "unet_dice": "U-Net Dice (%)",
}


def report(settings: Settings, run: Path) -> Path:
    """Write ``table.md``, ``fig2.png``, ``side_by_side.png`` and ``report.html``; return the page."""
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    rows = quality_rows(summary)
    write_text(run / "table.md", markdown(rows, summary))
    case = _typical_case(run)
    _save(figure_2(settings, run, case), run / "fig2.png")
    _save(side_by_side(settings, run, case), run / "side_by_side.png")
    write_text(run / "report.html", page(settings, run, summary, rows))
    return run / "report.html"


def quality_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table: one row per image, Tables 1 and 2 of the paper side by side."""
    rows = [["", *HEADINGS.values()]]
    for name, numbers in summary["means"].items():
        rows.append([TITLES[name], *(f"{numbers[k]:.1f}" if k in numbers else "" for k in HEADINGS)])
    return rows


def markdown(rows: list[list[str]], summary: dict[str, Any]) -> str:
    """The table and the two answers below it, as Markdown."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|---" * len(rows[0]) + "|"
    return "\n".join([head, rule, *body, "", *sentences(summary)]) + "\n"


def sentences(summary: dict[str, Any]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    lines = []
    for key, gap in summary["paired"].items():
        if key in ("unet_dice", "roi_rmse_hu", "whole_rmse_hu"):
            lines.append(
                f"{HEADINGS[key]}: TOD-Net minus MSE-WGAN {gap['mean']:+.2f} "
                f"(95 % interval {gap['low']:+.2f} to {gap['high']:+.2f}, n = {gap['n']}, "
                f"paired t p = {gap['t_p']:.2g}, Wilcoxon p = {gap['wilcoxon_p']:.2g})."
            )
    for name, found in summary["focus"].items():
        line = f"Gradient energy inside the organ, {TITLES[name]} loss: {found['share']:.1%}, "
        line += f"{found['ratio']:.1f} times its share of the volume"
        if name != "task":
            gap, low, high = (100 * found[key] for key in ("task_minus_this", "low", "high"))
            line += f"; the task loss has {gap:+.1f} points more ({low:+.1f} to {high:+.1f})"
        lines.append(line + ".")
    return lines


def figure_2(settings: Settings, run: Path, case: int) -> Any:
    """The paper's Fig. 2 on the half-trained TOD-Net's output for one test case."""
    low, normal, mask = Cases(run, "test")[case]
    half = load_denoiser(run / "denoisers" / settings.denoisers[-1] / "half.pt")
    with torch.no_grad():
        x_hat = half(low[None])
    loss = figure_loss(load_task(settings, run))
    maps = gradient_maps(loss, x_hat, reference=normal[None], label=mask[None])
    prediction = loss.terms["task"].predict(x_hat)
    return plot_gradient_maps(maps, prediction=prediction, roi=mask[None], window=(0, 1), titles=TITLES)


def side_by_side(settings: Settings, run: Path, case: int) -> Any:
    """One test slice: each image, its difference to normal dose, and the U-Net's hits and errors."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    normal_hu, low_hu, mask = Cases(run, "test").in_hu(case)
    unet = load_task(settings, run)
    images = {"normal_dose": normal_hu, "low_dose": low_hu}
    for name in settings.denoisers:
        network = load_denoiser(run / "denoisers" / name / "best.pt")
        images[name] = denoise_volume(network, low_hu, WINDOW_HU)
    cut = int(mask.sum((1, 2)).argmax())
    figure = Figure(figsize=(3.1 * len(images), 9.4), layout="constrained", dpi=120)
    grid = figure.subplots(3, len(images), squeeze=False)
    lower, upper = WINDOW_HU
    for column, (name, image) in zip(grid.T, images.items(), strict=True):
        for panel in column:
            panel.set_axis_off()
        grey = to_unit(image[cut]).numpy()
        column[0].imshow(grey, cmap="gray", vmin=0, vmax=1)
        column[0].set_title(TITLES[name])
        difference = image.clamp(lower, upper)[cut] - normal_hu.clamp(lower, upper)[cut]
        drawn = column[1].imshow(difference.numpy(), cmap="RdBu_r", vmin=-150, vmax=150)
        column[1].set_title("difference to normal dose (HU)", fontsize=9)
        column[2].imshow(_overlay(grey, segment(unet, image)[cut].numpy() > 0, mask[cut].numpy() > 0))
        column[2].set_title("U-Net's segmentation", fontsize=9)
    figure.colorbar(drawn, ax=list(grid[1]), shrink=0.8, pad=0.01)
    colours = (("true positive", "red"), ("false negative", "blue"), ("false positive", "lime"))
    figure.legend(handles=[Patch(color=c, label=n) for n, c in colours], loc="outside lower center", ncols=3)
    return figure


def page(settings: Settings, run: Path, summary: dict[str, Any], rows: list[list[str]]) -> str:
    """One HTML file with its figures inside; it needs no network."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    figures = {name: base64.b64encode((run / f"{name}.png").read_bytes()).decode() for name in ("fig2", "side_by_side")}
    return environment.get_template("report.html.jinja").render(
        settings=settings,
        rows=rows,
        sentences=sentences(summary),
        figures=figures,
        balance=[balance_rows(run, name) for name in settings.denoisers],
        titles=TITLES,
        denoisers=settings.denoisers,
    )


def balance_rows(run: Path, name: str) -> list[list[str]]:
    """Gradient norms at x_hat and effective weights through one training, from its log."""
    with (run / "denoisers" / name / "log.csv").open() as file:
        log = [row for row in csv.DictReader(file) if row.get("norm/mse")]
    terms = [key.removeprefix("norm/") for key in log[0] if key.startswith("norm/")]
    head = ["step", *(f"norm, {TITLES[t]}" for t in terms), *(f"weight, {TITLES[t]}" for t in terms)]
    body = [
        [row["step"], *(f"{float(row[f'{kind}/{t}']):.2g}" for kind in ("norm", "weight") for t in terms)]
        for row in log
    ]
    return [head, *body]


def _typical_case(run: Path) -> int:
    """The test case whose low-dose Dice is the median: neither the best nor the worst story."""
    with (run / "evaluation" / "cases.csv").open() as file:
        scores = [float(row["unet_dice"]) for row in csv.DictReader(file) if row["image"] == "low_dose"]
    return int(np.argsort(scores, kind="stable")[len(scores) // 2])


def _overlay(grey: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    image = np.repeat(grey[..., None], 3, axis=-1)
    for where, colour in ((found & truth, (1, 0, 0)), (~found & truth, (0, 0, 1)), (found & ~truth, (0, 1, 0))):
        image[where] = 0.5 * image[where] + 0.5 * np.asarray(colour)
    return image


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
