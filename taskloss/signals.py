"""Fig. 2 for one-dimensional signals: the signal on top, one gradient below it for each term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_signals(
    signals: Mapping[str, Any],
    classes: Mapping[str, Any],
    gradients: Mapping[str, Any],
    titles: Mapping[str, str],
    limits: Mapping[str, float],
    roi: Any | None,
    window: tuple[float, float] | None,
) -> Figure:
    """Draw panels under each other that share the samples' axis.

    Args:
        signals: Lines of the first panel by title, each ``(length,)``.
        classes: Label and prediction by title, as steps in a panel of their own.
        gradients: Gradients by term, each ``(length,)``.
        titles: Title of each gradient's panel.
        limits: Half the height of each gradient's panel.
        roi: Samples to shade, ``(length,)`` of booleans.
        window: Height of the first panel.
    """
    from matplotlib.figure import Figure

    heights = [2.0] + [0.8] * bool(classes) + [1.0] * len(gradients)
    figure = Figure(figsize=(8.5, 0.6 + 1.1 * sum(heights)), layout="constrained", dpi=130)
    panels = list(figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0])
    top = panels.pop(0)
    for (title, line), colour in zip(signals.items(), ("0.55", "tab:blue"), strict=False):
        top.plot(line, lw=1.0, color=colour, label=title)
    if window is not None:
        top.set_ylim(*window)
    top.legend(loc="upper right", fontsize=8, ncols=len(signals), frameon=False)
    if classes:
        panel = panels.pop(0)
        for (title, line), style in zip(classes.items(), ("-", "--"), strict=False):
            panel.plot(line, lw=1.0, ls=style, drawstyle="steps-mid", label=title)
        panel.legend(loc="upper right", fontsize=8, ncols=len(classes))
    for panel, (name, line) in zip(panels, gradients.items(), strict=True):
        panel.fill_between(range(len(line)), line.clip(min=0), color="tab:red", lw=0)
        panel.fill_between(range(len(line)), line.clip(max=0), color="tab:blue", lw=0)
        panel.set_ylim(-limits[name], limits[name])
        panel.axhline(0, lw=0.5, color="0.4")
        panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        panel.yaxis.get_offset_text().set_fontsize(7)
        panel.set_title(titles[name].replace("\n", ", "), fontsize=9)
    for panel in figure.axes:
        panel.tick_params(labelsize=7)
        for start, end in _runs(roi):
            panel.axvspan(start - 0.5, end - 0.5, color="0.5", alpha=0.15, lw=0)
    figure.axes[-1].set_xlabel("sample", fontsize=8)
    figure.axes[-1].set_xlim(0, max((len(line) for line in signals.values()), default=1) - 1)
    return figure


def _runs(mask: Any | None) -> Sequence[tuple[int, int]]:
    """Where a mask begins and ends."""
    runs: list[tuple[int, int]] = []
    for index, inside in enumerate([] if mask is None else mask):
        if inside and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif inside:
            runs.append((index, index + 1))
    return runs
