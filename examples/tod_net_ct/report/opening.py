"""What the page opens with: one region at both doses and denoised, one sentence, and what a reader must know first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..dose import to_unit
from ..evaluation import REFERENCE, title
from ..run import Settings
from ..scans import in_words
from .plots import Pictures

POOR_DICE = 50.0  # percent on normal dose: below it, a network's verdict on denoisers says nothing
FEW_STEPS = 100  # of a denoiser
FEW_CASES = 5


def opening_figure(shown: Pictures, columns: Sequence[str]) -> Any:
    """The organ's surroundings in one axial slice, an image for each column, with the true outline."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    dy, dx = shown.voxel_mm[1:]
    where = shown.mask if shown.mask.any() else shown.images["normal_dose"] > -300
    z = int(where.sum((1, 2)).argmax())
    rows, cols = (_around(where[z].any(axis), n) for axis, n in zip((1, 0), where.shape[1:], strict=True))
    ratio = ((rows.stop - rows.start) * dy) / ((cols.stop - cols.start) * dx)
    side = 3.0  # inches of an image
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01)
    figure = Figure(figsize=(side * len(columns), side * ratio + 0.4), layout=layout, dpi=130)
    for panel, name in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        panel.imshow(to_unit(shown.images[name][z, rows, cols]).numpy(), cmap="gray", vmin=0, vmax=1, aspect=dy / dx)
        truth = shown.mask[z, rows, cols].numpy()
        if truth.any() and not truth.all():
            panel.contour(truth, levels=[0.5], colors="#E69F00", linewidths=0.8)
        panel.set_title(title(name), fontsize=12)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure


def opening_columns(settings: Settings) -> list[str]:
    """Both doses, the reference denoiser, and the one before it that it is first compared with."""
    others = [name for name in settings.denoisers if name != REFERENCE]
    kept = [*others[:1], *(REFERENCE,)] if REFERENCE in settings.denoisers else others[:2]
    return ["normal_dose", "low_dose", *kept]


def opening_sentence(summary: dict[str, Any], settings: Settings, guide: str) -> str:
    """The guide's Dice at both doses and behind the denoisers that the picture shows; RMSE where no mask is."""
    means = summary["means"]
    shown = [("low", "none"), *(("low", name) for name in opening_columns(settings)[2:])]

    def of(dose: str, denoiser: str, key: str) -> float | None:
        found = means.get(dose, {}).get(denoiser, {}).get(key, {}).get("mean")
        return None if found is None or found != found else float(found)

    normal = of("normal", "none", f"{guide}_dice")
    values = [(name, of(dose, name, f"{guide}_dice")) for dose, name in shown]
    if normal is None or any(value is None for _, value in values):
        errors = [(name, of(dose, name, "whole_rmse_hu")) for dose, name in shown]
        told = ", ".join(f"{value:.1f} HU {_behind(name)}" for name, value in errors if value is not None)
        return f"Distance from normal dose over the whole image (RMSE, mean of {summary['n_cases']} cases): {told}."
    told = ", ".join(f"{value:.1f} {_behind(name)}" for name, value in values)
    return (
        f"{title(guide)} finds the {in_words(settings.organ)} with a Dice of {normal:.1f} % on normal dose, {told} "
        f"(mean of {summary['n_labelled']} test cases)."
    )


def cautions(summary: dict[str, Any], settings: Settings) -> list[str]:
    """What would mislead a reader who was not told: a run that is too short, too few cases, a judge that fails."""
    found = []
    if not settings.epochs and settings.steps < FEW_STEPS:
        found.append(
            f"A smoke run: {settings.steps} training steps for each denoiser show that everything works, and nothing "
            "about denoisers. Take no number from this page."
        )
    if summary["n_cases"] < FEW_CASES:
        found.append(f"{summary['n_cases']} test cases are too few for any test or interval to mean much.")
    for name in settings.task_networks:
        dice = summary["means"].get("normal", {}).get("none", {}).get(f"{name}_dice", {}).get("mean")
        if dice is not None and dice < POOR_DICE:
            found.append(
                f"{title(name)} is no judge here: on normal dose itself it reaches a Dice of {dice:.1f} %. Its columns "
                "say how it fails, not how good an image is; train it longer."
            )
    return found


def whole_image_sentence(summary: dict[str, Any]) -> str:
    """Whether the reference's whole image is further from normal dose than others', in words; empty if it is not."""
    worse = [
        gap
        for gap in summary["comparisons"]
        if gap["key"] == "whole_rmse_hu" and gap["ours"] == REFERENCE and gap["mean"] is not None and gap["mean"] > 0
    ]
    if not worse:
        return ""
    told = ", ".join(f"{gap['mean']:.1f} HU against {_named(gap['theirs'])}" for gap in worse)
    return f"The whole image got worse: {title(REFERENCE)}'s RMSE is higher by {told}."


def _named(name: str) -> str:
    return "the low dose as it came" if name == "none" else title(name)


def _behind(name: str) -> str:
    return "on low dose" if name == "none" else f"behind {title(name)}"


def _around(line: Any, n: int) -> slice:
    """Where the organ is, with a quarter of its extent on either side, at least a third of the image."""
    inside = line.nonzero().flatten()
    first, last = int(inside[0]), int(inside[-1])
    want = max(n // 3, round(1.5 * (last - first + 1)))
    start = min(max(0, (first + last + 1 - want) // 2), max(0, n - want))
    return slice(start, min(n, start + want))
