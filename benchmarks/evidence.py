"""The figure and the tables of docs/evidence.md, from the rows in ``results/``: ``python -m benchmarks.evidence``."""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .effects import IMAGE_METRICS, TASK_METRICS, Comparison, Estimate, Row, comparisons, mean_of, read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGE, README, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "README.md", ROOT / "docs" / "evidence" / "transfer.png"
TARGET = {"cifar10": 0.7, "imagenet": 0.7}  # transfer that the protocol asks for; a half for every other world
PAPERS_OWN = "balance=false;optimizer=rmsprop;learning_rate=5e-4;decay_learning_rate=false"
TITLES = {
    "half": "half the resolution",
    "quarter": "a quarter of the resolution",
    "noise25": "noise of 25/255",
    "noise50": "noise of 50/255",
    "jpeg10": "JPEG at quality 10",
    "jpeg5": "JPEG at quality 5",
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
    "ct_liver": "CT, liver",
    "ct_tumour": "CT, tumour",
    "ct_liver_tumour": "CT, liver and tumour",
    "heavy": "heavy dose",
    "paper": "the paper's dose",
    "tod_net": "TOD-Net",
    "tod_net@guides=unet+res_unet": "TOD-Net, two guides",
    f"tod_net@{PAPERS_OWN}": "TOD-Net, as the paper trains",
    f"mse_wgan@{PAPERS_OWN}": "MSE-WGAN, as the paper trains",
    "mse_wgan": "MSE-WGAN",
    "label_free": "TOD-Net, label-free",
    "mse": "MSE",
    "task": "MSE + task",
    "two_guides": "two guides in turns",
    "guides_together": "two guides together",
    "together_more_task": "two guides together, three times the task share",
    "three_together": "three guides together",
    "more_task": "three times the task share",
    "augmented": "guide seen through augmentation",
    "late": "MSE + task, late",
    "two_augmented": "two guides, augmented",
    "late_two_guides": "two guides, late",
    "late_three_guides": "three guides, late",
    "late_more_task": "three times the task share, late",
    "late_label_free": "label-free (KL), late",
    "late_features": "task + features, late",
    "late_augmented": "guide through augmentation, late",
    "late_two_augmented": "two guides, augmented, late",
    "task_features": "task + features",
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "roi_rmse_hu": "ROI RMSE (HU)",
    "top1": "top-1 (%)",
    "dice": "Dice (%)",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKS = "os^Dv<>pP*Xhd"
DECIMALS = {"psnr_db": 2, "ssim": 4, "roi_rmse_hu": 2}


def title(name: str) -> str:
    """A name as people write it; the changes of a denoiser (``tod_net@share_task=8``) stand in brackets."""
    if name in TITLES:
        return TITLES[name]
    name, _, changes = name.partition("@")
    written = TITLES.get(name, name.replace("_", " "))
    return f"{written} ({changes.replace(';', ', ')})" if changes else written


def shown(value: Estimate, decimals: int = 1) -> str:
    """``+1.2 [+0.8, +1.6]``; a dash where nothing was measured."""
    if not value.n or math.isnan(value.mean):
        return "–"
    bounds = "" if math.isnan(value.low) else f" [{value.low:+.{decimals}f}, {value.high:+.{decimals}f}]"
    return f"{value.mean:+.{decimals}f}{bounds}"


def share(value: Estimate) -> str:
    """``0.66 [0.60, 0.72]``."""
    if not value.n or math.isnan(value.mean):
        return "–"
    return f"{value.mean:.2f}" + ("" if math.isnan(value.low) else f" [{value.low:.2f}, {value.high:.2f}]")


def percent(value: float) -> str:
    """A share in percent, or a dash."""
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the blocks of the page -------------------------------------------------------------------------------------------


def effects_table(found: Sequence[Comparison]) -> str:
    """Gains, transfer and shares of the room, one comparison a row."""
    head = ["images", "loss beside MSE", "n", "guide", "p (Holm)", "unseen", "p (Holm)", "transfer"]
    head += ["unseen: way to clean", "guide: way to oracle"]
    return table(
        head,
        [
            [
                f"{title(one.world)}, {title(one.degradation)}",
                title(one.setting) + ("" if one.baseline == "mse" else f" (beside {title(one.baseline)})"),
                str(one.guide.n),
                shown(one.guide),
                "–" if math.isnan(one.holm_guide) else f"{one.holm_guide:.2g}",
                shown(one.unseen),
                "–" if math.isnan(one.holm) else f"{one.holm:.2g}",
                share(one.transfer),
                percent(one.to_clean),
                percent(one.to_oracle),
            ]
            for one in found
        ],
    )


def cost_table(found: Sequence[Comparison]) -> str:
    """What it costs: image quality, and clean input."""
    metrics = [m for m in IMAGE_METRICS if any(m in one.image for one in found)]
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    return table(
        ["images", "loss", *(title(m) for m in metrics), "unseen, on clean input"],
        [
            [
                f"{title(one.world)}, {title(one.degradation)}",
                title(one.setting),
                *(shown(one.image.get(m, nothing), DECIMALS.get(m, 1)) for m in metrics),
                shown(one.clean),
            ]
            for one in found
        ],
    )


def levels_tables(rows: Sequence[Row], stage: str) -> str:
    """The levels themselves: clean, degraded, every restorer, the oracle, by network."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.stage == stage and not row.metric.startswith("clean_"):
            groups[row.world, row.degradation].append(row)
    parts = []
    for (world, degradation), group in sorted(groups.items()):
        columns = list(dict.fromkeys((r.network, r.metric) for r in group if r.network or r.metric in IMAGE_METRICS))
        settings = sorted({r.setting for r in group}, key=_order)
        lines = []
        for setting in settings:
            cells = []
            for network, metric in columns:
                values = [r for r in group if r.setting == setting and (r.network, r.metric) == (network, metric)]
                value, digits = mean_of(values), DECIMALS.get(metric, 1)
                endless = metric == "psnr_db" and value >= 99
                cells.append("–" if math.isnan(value) else "∞" if endless else f"{value:.{digits}f}")
            n = len({(r.seed, r.unit) for r in group if r.setting == setting})
            lines.append([title(setting), str(n), *cells])
        heads = [network or title(metric) for network, metric in columns]
        metric = next((m for m in TASK_METRICS if any(r.metric == m for r in group)), "")
        parts.append(f"**{title(world)}, {title(degradation)}**, {title(metric)}:\n\n{table(['', 'n', *heads], lines)}")
    return "\n\n".join(parts) or "None."


def _order(setting: str) -> tuple[int, str]:
    first = ["clean", "degraded", "mse", "mse_wgan", "task", "tod_net"]
    return (first.index(setting), "") if setting in first else (99 if setting == "oracle" else 50, setting)


def sentences(found: Sequence[Comparison]) -> str:
    """What the confirming runs answer, in a sentence for each question."""
    confirmed = [one for one in found if one.stage == "confirming"]
    if not confirmed:
        return "No confirming run is complete yet."
    best = max(confirmed, key=lambda one: one.unseen.mean)
    where = f"on {title(best.world)} at {title(best.degradation)} ({title(best.setting)})"
    oracle = f", and the guide {percent(best.to_oracle)} of its way to the same network trained on the degraded images"
    way = "" if math.isnan(best.to_oracle) else oracle
    regained = percent(best.to_clean)
    helped = _count(confirmed, lambda c: c.guide.low > 0)
    carried = _count(confirmed, lambda c: c.unseen.low > 0 and c.holm < 0.05)
    harmed = sum(c.unseen.high < 0 and c.holm < 0.05 for c in confirmed)
    reached = _count(confirmed, lambda c: c.transfer.mean >= TARGET.get(c.world, 0.5))
    lines = [
        f"**The guide.** A task term helps its own guide significantly in {helped}.",
        f"**Unseen networks.** They gain significantly in {carried} and lose significantly in {harmed}; "
        f"the largest gain is {shown(best.unseen)} points {where}, where the guide gains {shown(best.guide)}"
        f"{_on_ct(confirmed)}.",
        f"**Transfer.** {share(best.transfer)} of the guide's gain carries over there; the target, "
        f"{TARGET.get(best.world, 0.5)} on natural images and 0.5 on CT, is reached by the estimate in "
        f"{reached}.",
        f"**The room.** Unseen networks regain {regained} of the way from MSE to clean images there{way}.",
        f"**The price.** {_price(confirmed)}",
    ]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def _on_ct(confirmed: Sequence[Comparison]) -> str:
    """The patients' comparisons from the worst to the best; nothing where there is none."""
    own = sorted((one for one in confirmed if one.world.startswith("ct")), key=lambda one: one.unseen.mean)
    if not own:
        return ""
    least, most = own[0], own[-1]
    span = f"by {shown(most.unseen)} points of Dice ({_of(most)})"
    if len(own) > 1:
        span = f"from {shown(least.unseen)} ({_of(least)}) to {shown(most.unseen)} points of Dice ({_of(most)})"
    sure = sum(one.holm < 0.05 for one in own)
    guide = shown(most.guide)
    return f"; on patients they change {span}, where the guide changes by {guide}: {sure} of {len(own)} significant"


def _of(one: Comparison) -> str:
    return f"{title(one.setting)}, {title(one.degradation)}"


def _count(found: Sequence[Comparison], holds) -> str:
    n = sum(bool(holds(one)) for one in found)
    return f"{n} of {len(found)} confirming comparisons"


def _price(found: Sequence[Comparison]) -> str:
    parts = []
    changes = {m: [one.image[m].mean for one in found if m in one.image] for m in ("psnr_db", "roi_rmse_hu")}
    for said, changed, unit in zip(("PSNR changes", "the region's RMSE"), changes.values(), ("dB", "HU"), strict=True):
        if changed:
            parts.append(f"{said} by {min(changed):+.2f} to {max(changed):+.2f} {unit}")
    clean = [one.clean for one in found if one.clean.n]
    if clean:
        span = f"{min(c.mean for c in clean):+.1f} to {max(c.mean for c in clean):+.1f}"
        parts.append(f"unseen networks change by {span} points on input that was clean already")
    return "; ".join(parts) + "."


def blocks(rows: Sequence[Row], folder: Path = RESULTS) -> dict[str, str]:
    """The generated parts of the pages by name; the alarms are read in the folder of the rows."""
    found = comparisons(rows)
    confirmed = [one for one in found if one.stage == "confirming"]
    explored = [one for one in found if one.stage == "exploration"]
    none = "None yet."
    return {
        "sentences": sentences(found),
        "alarms": alarms(folder),
        "effects": effects_table(confirmed) if confirmed else none,
        "cost": cost_table(confirmed) if confirmed else none,
        "levels": levels_tables(rows, "confirming"),
        "exploration": effects_table(explored) + "\n\n" + cost_table(explored) if explored else none,
    }


def alarms(folder: Path) -> str:
    """What the transfer meter said, out of the printed output that is kept beside the results."""
    found = []
    for path in sorted(folder.glob("*/*.txt")):
        said = re.findall(r"^the transfer meter on (.*?): (.*)$", path.read_text(), flags=re.MULTILINE)
        found += [f"- **{path.parent.name.replace('_', ' ')}** ({place}): {words}." for place, words in said]
    return "\n".join(found) or "None yet."


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with every block between its markers replaced."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{parts[match[2]]}\n{match[3]}"

    return re.sub(r"(<!-- evidence:(\w+) -->).*?(<!-- /evidence -->)", fill, page, flags=re.DOTALL)


def draw(found: Sequence[Comparison], path: Path) -> None:
    """Gain on the guide against gain on unseen networks: a named mark with intervals for each confirming comparison,
    and a small hollow one for each of exploration.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    confirmed = [one for one in found if one.stage == "confirming"]
    explored = [one for one in found if one.stage != "confirming"]
    figure = Figure(figsize=(6.4, 4.6 + 0.2 * len(confirmed)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spans = [_span(confirmed, explored, of) for of in ("guide", "unseen")]
    reach = spans[0][1]
    for slope, words in ((1, "all of it"), (0.7, "0.7"), (0.5, "0.5")):
        style = "-" if slope == 1 else "--"
        end = min(reach, spans[1][1] / slope)
        axes.plot([0, end], [0, slope * end], color="0.75", lw=1, ls=style, zorder=0)
        axes.annotate(words, (end, slope * end), (3, 0), textcoords="offset points", color="0.45", fontsize=8)
    axes.axhline(0, color="0.75", lw=1, zorder=0)
    places = list(dict.fromkeys((one.world, one.degradation) for one in found))
    colours = {place: COLOURS[i % len(COLOURS)] for i, place in enumerate(places)}
    settings = list(dict.fromkeys(one.setting for one in confirmed))
    for one in confirmed:
        bars = [[[g.mean - g.low], [g.high - g.mean]] for g in (one.guide, one.unseen)]
        axes.errorbar(
            one.guide.mean,
            one.unseen.mean,
            xerr=bars[0],
            yerr=bars[1],
            color=colours[one.world, one.degradation],
            lw=1,
            fmt=MARKS[settings.index(one.setting) % len(MARKS)],
            ms=6,
            label=f"{title(one.world)}, {title(one.degradation)}: {title(one.setting)}",
        )
    for i, one in enumerate(explored):
        look = {"ms": 4, "mfc": "none", "mec": colours[one.world, one.degradation], "alpha": 0.7, "ls": "", "zorder": 1}
        axes.plot(one.guide.mean, one.unseen.mean, "o", label=None if i else "exploration, in the same colours", **look)
    axes.set(xlim=spans[0], ylim=spans[1])
    axes.set(xlabel="gain of the guide (points)", ylabel="mean gain of unseen networks (points)")
    axes.spines[["top", "right"]].set_visible(False)
    if found:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _span(confirmed: Sequence[Comparison], explored: Sequence[Comparison], of: str) -> tuple[float, float]:
    """The intervals of what is confirmed and the means of what is explored, with a margin."""
    gains = [getattr(one, of) for one in confirmed]
    ends = [0.0, 1.0, *(end for gain in gains for end in gain[:3] if end == end)]
    ends += [getattr(one, of).mean for one in explored]
    margin = 0.05 * (max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def main(arguments: list[str] | None = None) -> None:
    """Write the blocks of the page and of the README, and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = read(args.results)
    for page in (PAGE, README):
        page.write_text(filled(page.read_text(), blocks(rows, args.results)))
    draw(comparisons(rows), FIGURE)


if __name__ == "__main__":
    main()
