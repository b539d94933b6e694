"""The README's before and after, from the committed rows of the best confirming comparison:
``python -m benchmarks.before_after`` draws docs/images/before_after.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .effects import Comparison, Row, comparisons, mean_of, read
from .evidence import RESULTS, title

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "before_after.png"
GREY, BEFORE, AFTER = "0.55", "#0072B2", "#D55E00"


def best(rows: Sequence[Row]) -> Comparison:
    """The confirming comparison from which unseen networks gain most."""
    confirmed = [one for one in comparisons(rows) if one.stage == "confirming" and one.unseen.n]
    if not confirmed:
        raise LookupError(f"no complete confirming comparison in {RESULTS}; run examples/natural_images.py first")
    return max(confirmed, key=lambda one: one.unseen.mean)


def levels(rows: Sequence[Row], one: Comparison) -> dict[tuple[str, bool], dict[str, list[float]]]:
    """By network and whether it guided: the values over seeds on degraded, restored and clean images."""
    kept = [
        row
        for row in rows
        if (row.world, row.degradation, row.stage, row.metric) == (one.world, one.degradation, one.stage, "top1")
        and row.network
    ]
    guides = {row.network for row in kept if row.setting == one.setting and row.role == "guide"}
    networks = sorted({row.network for row in kept}, key=lambda name: (name not in guides, name))
    settings = ("degraded", one.baseline, one.setting, "clean")
    return {
        (name, name in guides): {
            setting: [row.value for row in kept if (row.network, row.setting) == (name, setting)]
            for setting in settings
        }
        for name in networks
    }


def caption(rows: Sequence[Row]) -> str:
    """What the picture shows, in numbers."""
    one = best(rows)
    table = levels(rows, one)
    before, after = (
        math.fsum(math.fsum(values[s]) / len(values[s]) for (_, guides), values in table.items() if not guides)
        / sum(not guides for _, guides in table)
        for s in (one.baseline, one.setting)
    )
    alike = (row for row in rows if (row.world, row.degradation, row.stage) == (one.world, one.degradation, one.stage))
    psnr = [row for row in alike if row.metric == "psnr_db"]
    decibels = (mean_of(row for row in psnr if row.setting == setting) for setting in (one.baseline, one.setting))
    guides = sum(guided for _, guided in table)
    lookers = {1: "one classifier", 2: "two classifiers"}.get(guides, f"{guides} classifiers")
    return (
        f"*Before and after: {title(one.world)} at {title(one.degradation)}, restored by one network with MSE alone "
        f"and with a task loss through {lookers}. Classifiers that the loss never saw name {before:.1f} % and "
        f"{after:.1f} % of the images; PSNR is {' and '.join(f'{value:.2f}' for value in decibels)} dB. "
        f"Light marks: {one.unseen.n} trainings.*"
    )


def draw(path: Path = PICTURE) -> None:
    """One row per network: degraded, before, after, clean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(RESULTS)
    one = best(rows)
    table = levels(rows, one)
    figure = Figure(figsize=(9.0, 0.9 + 0.48 * len(table)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    looks = {
        "degraded": ("x", GREY, "degraded"),
        one.baseline: ("o", BEFORE, "restored, MSE alone"),
        one.setting: ("s", AFTER, "restored, MSE and task loss"),
        "clean": ("|", GREY, "clean"),
    }
    for y, values in enumerate(table.values()):
        means = {setting: math.fsum(values[setting]) / len(values[setting]) for setting in looks}
        axes.annotate(
            "",
            (means[one.setting], y),
            (means[one.baseline], y),
            arrowprops={"arrowstyle": "-|>", "color": AFTER, "lw": 1.6, "shrinkA": 6, "shrinkB": 5},
        )
        for setting, (mark, colour, label) in looks.items():
            if len(values[setting]) > 1:
                axes.plot(values[setting], [y] * len(values[setting]), mark, color=colour, ms=4, alpha=0.35, mew=0)
            size = 13 if mark == "|" else 8
            axes.plot(means[setting], y, mark, color=colour, ms=size, mew=2, label=None if y else label)
            if setting in (one.baseline, one.setting):
                where = (means[setting], y - 0.24)
                axes.annotate(f"{means[setting]:.1f}", where, ha="center", va="bottom", fontsize=9, color=colour)
    names = [f"{name.replace('resnet', 'ResNet-')} ({'guide' if guides else 'unseen'})" for name, guides in table]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.6, -0.65)
    axes.set_xlabel(f"images named rightly, {title('top1')}: {title(one.world)}, {title(one.degradation)}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.93", lw=8, zorder=-1)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(looks), frameon=False, fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    draw()
    print(caption(read(RESULTS)))
