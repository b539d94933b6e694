"""The study in one figure: every difference that was asked for, seed by seed and with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation import heading, title

WIDE = 10.0  # times the median interval, from which the axis is logarithmic beyond one


def forest(gaps: Sequence[dict[str, Any]], subject: str) -> Any:
    """Differences as points with their 95 % intervals over seeds (thick) and over cases (thin).

    Args:
        gaps: as `summary.answers` gives them, all of one question and in one unit.
        subject: the question.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.1 + 0.32 * len(gaps)), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=0.8)
    names, reaches = [], []
    for y, gap in enumerate(gaps):
        theirs = "no denoiser" if gap["theirs"] == "none" else title(gap["theirs"])
        names.append(f"{title(gap['ours'])} - {theirs}, {heading(gap['key'])}")
        for kind, width in (("case", 1.0), ("seed", 3.0)):
            low, high = gap[f"by_{kind}_low"], gap[f"by_{kind}_high"]
            if low is not None and high is not None:
                offset = 0.14 if kind == "case" else 0.0
                axes.plot([low, high], [y + offset] * 2, color="#0072B2", linewidth=width, solid_capstyle="butt")
        known = (gap["mean"], gap["by_seed_low"], gap["by_seed_high"], gap["by_case_low"], gap["by_case_high"])
        reaches.append(max(abs(number) for number in known if number is not None))
        axes.plot(gap["mean"], y, "o", color="#D55E00", markersize=5, zorder=3)
    axes.set_yticks(range(len(gaps)), names, fontsize=8)
    axes.invert_yaxis()
    figure.suptitle(subject, fontsize=10)
    if max(reaches) > WIDE * sorted(reaches)[len(reaches) // 2]:  # else one wide interval hides all the others
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("mean difference; thick: 95 % over seeds, thin: 95 % over cases", fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
