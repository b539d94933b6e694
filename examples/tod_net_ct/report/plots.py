"""The figures: gradient maps, a case in two planes, learning curves, and how Dice spreads over the cases."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taskloss import TaskOrientedLoss, gradient_maps, plot_gradient_maps

from ..dose import WINDOW_HU, to_unit
from ..evaluation import Row, device_of, figure_loss, half_trained, title, training_view, values_of
from ..inference import segment
from ..run import Settings
from ..scans import Cases
from ..training import load_task, restorer

# Okabe and Ito's colours, which people with any colour vision tell apart; errors are also told by the truth's outline
HIT, MISSED, FALSE = "#0072B2", "#D55E00", "#F0E442"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
TERM_COLOURS = {
    "mse": "#0072B2",
    "task": "#D55E00",
    "adv": "#009E73",
    "perceptual": "#CC79A7",
    "autoencoder": "#E69F00",
    "total": "#555555",
}
DIFFERENCE_HU = 150.0


@dataclass(frozen=True, eq=False)
class Pictures:
    """One test case as it was, as every denoiser left it, and what the task networks saw in each."""

    case: str
    voxel_mm: tuple[float, ...]
    mask: Tensor
    images: dict[str, Tensor]  # "normal_dose", "low_dose", then denoisers of the low dose, in HU
    found: dict[str, dict[str, Tensor]]  # by image, by task network


def pictures(settings: Settings, run: Path, index: int) -> Pictures:
    """Denoise and segment one test case."""
    cases, device = Cases(run, "test"), device_of(settings)
    normal_hu, low_hu, mask = cases.in_hu(index)
    voxel_mm = cases.voxel_mm_of(index)
    images = {"normal_dose": normal_hu, "low_dose": low_hu}
    images |= {name: restorer(name, settings, run, device)(low_hu) for name in settings.denoisers}
    networks = {name: load_task(settings, run, name).to(device) for name in settings.task_networks}
    found = {
        image: {
            name: segment(network, volume, voxel_mm, settings.voxel_mm, device=device) > 0
            for name, network in networks.items()
        }
        for image, volume in images.items()
    }
    return Pictures(cases.paths[index].stem, voxel_mm, mask > 0, images, found)


def gradient_figure(settings: Settings, run: Path, index: int) -> Any | None:
    """The paper's Fig. 2 on the half-trained TOD-Net's output for one test case; None if there is no such output."""
    half, device = half_trained(settings, run), device_of(settings)
    low, normal, mask = (volume.to(device) for volume in training_view(Cases(run, "test"), index, settings))
    if half is None or not mask.any():
        return None
    with torch.no_grad():
        x_hat = half(low)
    loss = figure_loss(settings, run)
    maps = gradient_maps(loss, x_hat, reference=normal, label=mask)
    titles = {"mse": "MSE", "l1": "L1", "perceptual": "perceptual", "task": "task"}
    return plot_gradient_maps(
        maps, prediction=loss["task", TaskOrientedLoss].predict(x_hat), roi=mask > 0, window=(0, 1), titles=titles
    )


def case_figure(shown: Pictures, network: str, columns: Sequence[str]) -> Any:
    """The paper's Fig. 3: images, differences to normal dose and the segmentation's errors, axial and coronal."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    planes = _planes(shown)
    wide = max(width for _, _, width, _ in planes)
    ratios = [height / wide for _, _, _, height in planes] * 3
    side = 2.35  # inches of a column
    heights = [side * ratio for ratio in ratios]
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(side * len(columns) + 0.9, sum(heights) + 1.6), layout=layout, dpi=130)
    grid = figure.subplots(6, len(columns), squeeze=False, height_ratios=ratios)
    normal = shown.images["normal_dose"].clamp(*WINDOW_HU)
    labels = [f"{what}\n{plane}" for what in ("image", "difference", "errors") for plane in ("axial", "coronal")]
    drawn = None
    for column, name in zip(grid.T, columns, strict=True):
        column[0].set_title(title(name), fontsize=12)
        for panel in column:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for row, (cut, aspect, _, _) in enumerate(planes):
            grey = to_unit(cut(shown.images[name])).numpy()
            truth = cut(shown.mask).numpy()
            column[row].imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=aspect)
            if name != "normal_dose":
                gap = (cut(shown.images[name].clamp(*WINDOW_HU)) - cut(normal)).numpy()
                panel = column[2 + row]
                drawn = panel.imshow(gap, cmap="RdBu_r", vmin=-DIFFERENCE_HU, vmax=DIFFERENCE_HU, aspect=aspect)
            column[4 + row].imshow(overlay(grey, cut(shown.found[name][network]).numpy(), truth), aspect=aspect)
            if truth.any() and not truth.all():
                column[4 + row].contour(truth, levels=[0.5], colors="white", linewidths=0.8)
    for panel, label in zip(grid[:, 0], labels, strict=True):
        panel.set_ylabel(label, fontsize=10)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(grid[2:4].flat), shrink=0.9, pad=0.01, aspect=25)
        bar.set_label("HU above normal dose", fontsize=10)
    colours = (
        ("found (true positive)", HIT),
        ("missed (false negative)", MISSED),
        ("false alarm (false positive)", FALSE),
    )
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours],
        loc="outside lower center",
        ncols=3,
        fontsize=10,
        frameon=False,
    )
    return figure


def overlay(grey: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A grey slice with hits, misses and false alarms laid over it, `(rows, columns, 3)`."""
    from matplotlib.colors import to_rgb

    image = np.repeat(grey[..., None], 3, axis=-1)
    for where, colour, weight in (
        (found & truth, HIT, 0.45), (~found & truth, MISSED, 0.75), (found & ~truth, FALSE, 0.75),
    ):  # fmt: skip
        image[where] = (1 - weight) * image[where] + weight * np.asarray(to_rgb(colour))
    return image


def _planes(shown: Pictures) -> list[tuple[Any, float, float, float]]:
    """Axial and coronal: how to cut, the pixels' aspect, width and height in mm. Air around the body is cut away."""
    dz, dy, dx = shown.voxel_mm
    where = shown.mask if shown.mask.any() else torch.ones_like(shown.mask)
    z, y = int(where.sum((1, 2)).argmax()), int(where.sum((0, 2)).argmax())
    rows, columns = body_of(shown)
    depth = shown.mask.shape[0]
    width, height = (columns.stop - columns.start) * dx, (rows.stop - rows.start) * dy
    return [
        (lambda volume: volume[z, rows, columns], dy / dx, width, height),
        (lambda volume: volume[:, y, columns].flip(0), dz / dx, width, depth * dz),  # head up
    ]


def body_of(shown: Pictures) -> tuple[slice, slice]:
    """The rows and columns of a case that hold more than air."""
    body = (shown.images["normal_dose"] > -300).any(0)
    rows, columns = _extent(body.any(1)), _extent(body.any(0))
    return rows, columns


def _extent(line: Tensor) -> slice:
    inside = line.nonzero().flatten()
    if not len(inside):
        return slice(0, len(line))
    return slice(max(0, int(inside[0]) - 1), min(len(line), int(inside[-1]) + 2))


def dice_figure(rows: Sequence[Row], networks: Sequence[str], denoisers: Sequence[str]) -> Any:
    """Every case's Dice on low dose: a panel per task network, a box and the cases themselves per denoiser."""
    from matplotlib.figure import Figure

    kinds = [("normal", "none"), ("low", "none"), *(("low", name) for name in denoisers)]
    labels = ["Normal dose", "Low dose", *map(title, denoisers)]
    across = min(2, len(networks))
    down = -(-len(networks) // across)
    figure = Figure(figsize=(5.2 * across, down * (0.9 + 0.36 * len(kinds))), layout="constrained", dpi=130)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for panel in list(grid.flat)[len(networks) :]:
        panel.set_axis_off()
    jitter = np.random.default_rng(0)
    named = "orientation" in inspect.signature(grid[0, 0].boxplot).parameters  # from matplotlib 3.10 on
    lying: dict[str, Any] = {"orientation": "horizontal"} if named else {"vert": False}
    for panel, network in zip(grid.flat, networks, strict=False):
        for place, (dose, denoiser) in enumerate(kinds):
            values = np.asarray(values_of(rows, dose, denoiser, f"{network}_dice"))
            values = values[np.isfinite(values)]
            colour = COLOURS[place % len(COLOURS)]
            if len(values):
                panel.boxplot(
                    values, positions=[place], **lying, widths=0.62, showfliers=False,
                    patch_artist=True, boxprops={"facecolor": colour, "alpha": 0.25, "edgecolor": colour},
                    medianprops={"color": colour, "linewidth": 2}, whiskerprops={"color": colour},
                    capprops={"color": colour},
                )  # fmt: skip
                spread = jitter.uniform(-0.2, 0.2, len(values))
                panel.plot(values, place + spread, "o", color=colour, markersize=3.5, alpha=0.75)
        panel.set_yticks(range(len(labels)), labels, fontsize=10)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.set_title(title(network), fontsize=12)
        panel.set_xlabel("Dice (%)", fontsize=10)
        panel.grid(axis="x", color="#dddddd")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def learning_figure(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Any | None:
    """A row per denoiser: its terms, their gradient norms at x_hat, their effective weights, and validation."""
    from matplotlib.figure import Figure

    if not logs:
        return None
    kinds = (("g/", "terms, as computed"), ("norm/", "gradient norm at x_hat"), ("weight/", "effective weight"),
             ("validation/", "validation"))  # fmt: skip
    figure = Figure(figsize=(13, 2.7 * len(logs) + 0.5), layout="constrained", dpi=110)
    grid = figure.subplots(len(logs), len(kinds), squeeze=False)
    for line, (name, log) in zip(grid, logs.items(), strict=True):
        for panel, (prefix, heading) in zip(line, kinds, strict=True):
            terms = dict.fromkeys(key for row in log for key in row if key.startswith(prefix))
            positive = True
            for i, key in enumerate(terms):
                points = [(row["step"], row[key]) for row in log if key in row]
                term = key.removeprefix(prefix)
                steps, values = zip(*points, strict=True)
                positive &= min(values) > 0
                marker = "o" if len(points) < 40 else ""
                colour = TERM_COLOURS.get(term, COLOURS[i % len(COLOURS)])
                panel.plot(steps, values, marker=marker, markersize=3, linewidth=1.3, label=title(term), color=colour)
            if terms:
                panel.legend(fontsize=8, framealpha=0.7, edgecolor="none")
                panel.set_yscale("log" if positive and prefix != "validation/" else "linear")
            if prefix == "g/" and not positive:
                panel.set_yscale("symlog", linthresh=1e-3)
            panel.set_title(f"{title(name)}: {heading}", fontsize=10)
            panel.tick_params(which="both", labelsize=8)
            panel.set_xlabel("step", fontsize=9)
            panel.grid(color="#e5e5e5")
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def task_figure(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Any | None:
    """How the task networks' Dice loss fell, each point the mean of a fiftieth of the training."""
    from matplotlib.figure import Figure

    if not logs:
        return None
    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=110)
    panel = figure.subplots()
    for colour, (name, log) in zip(COLOURS, logs.items(), strict=False):
        size = max(1, len(log) // 50)
        blocks = [log[i : i + size] for i in range(0, len(log) - size + 1, size)]
        steps = [block[-1]["step"] for block in blocks]
        losses = [float(np.mean([row["dice_loss"] for row in block])) for block in blocks]
        panel.plot(steps, losses, color=colour, linewidth=1.5, label=title(name))
    panel.set(xlabel="step", ylabel="Dice loss on normal dose", yscale="log")
    panel.legend(fontsize=9, frameon=False)
    panel.grid(color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def read_log(path: Path) -> list[dict[str, float]]:
    """A training's ``log.csv``, without its blanks; empty if there is none.

    Raises:
        ValueError: it is no table of numbers with a column for the step.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            rows = [{key: float(text) for key, text in row.items() if text} for row in csv.DictReader(file)]
        steps = [row["step"] for row in rows]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{path}: expected the log of a training, got a damaged file; remove the folder {path.parent} and start "
            "again"
        ) from error
    if not steps:
        raise ValueError(f"{path}: expected the log of a training, got an empty file; remove the folder {path.parent}")
    return rows
