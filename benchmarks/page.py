"""The page and the plots, made of the committed results alone: ``python -m benchmarks.page``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import Case, Target, quartiles

Found = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
RESULTS = Path(__file__).parent / "results"
PAGE = Path("docs/benchmarks.md")
REASONS = RESULTS / "reasons.json"  # by benchmark: why a target is missed, after a look at the profile


def write(results: Path, page: Path) -> None:
    """Write the page for every machine in `results`, and a plot for each benchmark beside it."""
    parts = [HEAD]
    folder = page.parent / page.stem
    for path in sorted(results.glob("*.json")):
        if path == results / REASONS.name:
            continue
        found = json.loads(path.read_text())
        parts += [machine_part(path.stem, found, results)]
        for name, benchmark in found["benchmarks"].items():
            if "cases" not in benchmark:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            image = folder / f"{path.stem}-{name}.png"
            if draw(benchmark, image):
                parts.append(f"### {name}\n\n{benchmark['about']}\n\n![{name}]({page.stem}/{image.name})\n")
            else:
                parts.append(f"### {name}\n\n{benchmark['about']}\n")
            parts.append(details(benchmark))
    page.parent.mkdir(parents=True, exist_ok=True)
    unfinished = page.with_suffix(".part")
    unfinished.write_text("\n".join(parts))
    unfinished.replace(page)


HEAD = """# Benchmarks

Written by `make bench` from `benchmarks/results/`; nothing here is typed by hand. Every comparison first asserts that
both sides compute the same within the tolerance given. The sides take turns within one process, so the machine's moods
hit both; a ratio is the median over the rounds with its 95 % interval. A target is met within noise where the median
misses it and the interval reaches it. While time is taken, freed memory stays with the process. Memory is the peak of
one turn above what was held before it, from the operating system on a CPU and from the allocator on CUDA.
`make bench-compare` reports ratios that became worse by more than 10 %; where the intervals leave that open it measures
again, up to three times, and then says so.
"""


def machine_part(name: str, found: Found, results: Path) -> str:
    """The machine, what was installed, and every target in one table, with the reasons of those that miss."""
    machine = found["machine"]
    total = sum(b.get("seconds", 0) for b in found["benchmarks"].values())
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    installed = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    lines = [
        f"## {name}",
        "",
        f"{about}. {total / 60:.0f} minutes in all. {installed}.",
        "",
        "| benchmark | case | what | target | measured | met |",
        "|---|---|---|---|---|---|",
    ]
    missed = set()
    for benchmark, own in found["benchmarks"].items():
        if "failed" in own:
            lines.append(f"| {benchmark} | | | | {own['failed']} | **no** |")
        for case in own.get("cases", []):
            for target in case["targets"]:
                verdict = Target(**target).verdict(*ratio_of(case, target))
                if verdict != "yes":
                    missed.add(benchmark)
                cells = [benchmark, case["name"], words(target), bound(target), number_of(case, target)]
                lines.append("| " + " | ".join([*cells, "**no**" if verdict == "no" else verdict]) + " |")
    gaps = [f"- {b}, {c['name']}: {gap}" for b, own in found["benchmarks"].items() for c in own.get("cases", [])
            for gap in c["gaps"]]  # fmt: skip
    if gaps:
        lines += ["", "Missing peers:", "", *gaps]
    reasons = json.loads((results / REASONS.name).read_text()) if (results / REASONS.name).exists() else {}
    told = [
        f"- {benchmark}: {reasons.get(name, {}).get(benchmark, 'not explained yet')}" for benchmark in sorted(missed)
    ]
    if told:
        lines += ["", "Why targets are missed:", "", *told]
    return "\n".join([*lines, ""])


def details(benchmark: Found) -> str:
    """Every case's medians, peaks, agreement, values and notes."""
    about = f"{benchmark['threads']} threads, {benchmark['rounds']} rounds, {benchmark['seconds']:.0f} s"
    lines = [f"{about}; at commit {benchmark['commit']}.", ""]
    for case in benchmark["cases"]:
        lines += [f"**{case['name']}**", ""]
        if case["seconds"]:
            lines += ["| side | median (ms) | quartiles | peak (MB) |", "|---|---|---|---|"]
            for side, samples in case["seconds"].items():
                middle, low, high = (1e3 * q for q in quartiles(samples))
                peak = case["peak_bytes"].get(side, -1)
                memory = f"{peak / 1e6:.1f}" if peak >= 0 else ""
                lines.append(f"| {side} | {middle:.4g} | {low:.4g} to {high:.4g} | {memory} |")
            lines.append("")
        told = [f"{name}: {value:.4g}" for name, value in case["values"].items()]
        told += [
            f"{pair}: equal within {worst:.1e} (tolerance {allowed:.0e})"
            for pair, (worst, allowed) in case["agreement"].items()
        ]
        lines += [f"- {line}" for line in (*told, *case["notes"])]
        if told or case["notes"]:
            lines.append("")
    return "\n".join(lines)


def lines_of(name: str, benchmark: Found) -> list[str]:
    """One line for each target, for the terminal."""
    if "failed" in benchmark:
        return [f"{name}: {benchmark['failed']}"]
    lines = [f"{name}: {benchmark['seconds']} s"]
    for case in benchmark["cases"]:
        for target in case["targets"]:
            verdict = {"yes": "met", "no": "MISSED"}.get(
                found := Target(**target).verdict(*ratio_of(case, target)), found
            )
            lines.append(f"  {case['name']}: {words(target)} {number_of(case, target)}, {bound(target)}: {verdict}")
        lines += [f"  {case['name']}: {gap}" for gap in case["gaps"]]
    return lines


def ratio_of(case: Found, target: Found) -> tuple[float, float, float]:
    """Median, and its 95 % interval, of what a target speaks of."""
    about = {key: case[key] for key in ("name", "seconds", "peak_bytes", "values")}
    return Case(**about).ratio(Target(**target))


def words(target: Found) -> str:
    """What a target compares."""
    if target["quantity"] == "value":
        return str(target["ours"])
    what = {"seconds": "time", "peak_bytes": "peak memory"}[target["quantity"]]
    return f"{what}, {target['ours']} / {target['theirs']}"


def bound(target: Found) -> str:
    """The target's bound."""
    parts = [f"at most {target['at_most']:g}"] if target["at_most"] is not None else []
    parts += [f"at least {target['at_least']:g}"] if target["at_least"] is not None else []
    return ", ".join(parts) or "reported"


def number_of(case: Found, target: Found) -> str:
    """The number that was measured, with its interval."""
    middle, low, high = ratio_of(case, target)
    return f"{middle:.3g}" if low == high else f"{middle:.3g} ({low:.3g} to {high:.3g})"


def draw(benchmark: Found, path: Path) -> bool:
    """A plot of a benchmark: its cost curves if it has some, else each side's time over its case's first side."""
    curves = [case for case in benchmark["cases"] if case["curve"]]
    timed = [case for case in benchmark["cases"] if len(case["seconds"]) > 1]
    if not curves and not timed:
        return False
    from matplotlib.figure import Figure

    if curves:
        figure = Figure(figsize=(3.4 * len(curves), 3.6), layout="constrained", dpi=110)
        for axes, case in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            _curve(axes, case)
    else:
        n_bars = sum(len(case["seconds"]) for case in timed)
        figure = Figure(figsize=(7.5, 0.9 + 0.3 * n_bars + 0.3 * len(timed)), layout="constrained", dpi=110)
        _bars(figure.subplots(), timed)
    unfinished = path.with_suffix(".part")
    figure.savefig(unfinished, format="png", metadata={"Software": None})
    unfinished.replace(path)
    return True


def _curve(axes: Any, case: Found) -> None:
    for colour, (side, points) in zip(COLOURS, case["curve"]["points"].items(), strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=side, markersize=4, linewidth=1.3)
    axes.set(xscale="log", yscale="log", ylabel="seconds")
    ticks = sorted({x for points in case["curve"]["points"].values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(case["curve"]["axis"], fontsize=8)
    axes.set_title(case["name"], fontsize=8, wrap=True)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)  # off the curves


def _bars(axes: Any, cases: Sequence[Found]) -> None:
    y, ticks, names = 0.0, [], []
    for case in cases:
        first = next(iter(case["seconds"].values()))
        for i, (side, samples) in enumerate(case["seconds"].items()):
            middle, low, high = quartiles([b / a for a, b in zip(first, samples, strict=True)])
            axes.barh(y, middle, color=COLOURS[0] if i == 0 else COLOURS[-1], height=0.75)
            axes.plot([low, high], [y, y], color="black", linewidth=1)
            axes.annotate(f"{middle:.3g}", (max(middle, high), y), (3, 0), textcoords="offset points", va="center",
                          fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            ticks.append(y)
            names.append(f"{case['name']}: {side}" if i == 0 else side)
            y += 1
        y += 0.6
    axes.set_yticks(ticks, names, fontsize=7)
    axes.invert_yaxis()
    longest = max(patch.get_width() for patch in axes.patches)
    if longest > 20:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xlabel("time over the first side of the case, median and quartiles", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--page", type=Path, default=PAGE)
    arguments = options.parse_args()
    write(arguments.results, arguments.page)
