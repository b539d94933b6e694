"""What a setting changes beside its baseline, from the rows in ``results/``: paired effects, intervals and tests."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from scipy import stats

# what a setting is compared with, where that is not "mse"
BASELINES = {"tod_net": "mse_wgan", "label_free": "mse_wgan"}
REFERENCES = ("clean", "degraded", "oracle")
ENOUGH_UNITS = 5  # seeds or patients; a confirming comparison with fewer is reported as exploration
TASK_METRICS = ("top1", "dice")
IMAGE_METRICS = ("psnr_db", "ssim", "roi_rmse_hu")

Unit = tuple[str, str]  # seed and patient; the patient is empty where the seed alone is the unit


class Row(NamedTuple):
    """One measured value, as the header of ``results/*/*.csv`` names it."""

    world: str
    degradation: str
    setting: str
    stage: str
    seed: str
    unit: str
    network: str
    role: str
    metric: str
    value: float


class Estimate(NamedTuple):
    """A mean with its 95 % interval, from n units; the interval is NaN where there is but one."""

    mean: float
    low: float
    high: float
    n: int
    p: float = math.nan

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]" if self.n > 1 else f"{self.mean:+.1f}"


@dataclass(frozen=True)
class Comparison:
    """A setting beside its baseline under one degradation.

    Attributes:
        guide: Gain of the networks that guided it.
        unseen: Mean gain of the networks that did not.
        transfer: ``unseen / guide`` with Fieller's interval; NaN bounds where the guide's gain may be zero.
        image: Change of each image metric.
        clean: Change of the unseen networks on input that was not degraded.
        to_clean: The unseen networks' gain as a share of their distance from the baseline to clean images.
        to_oracle: The gain of the guides that have an oracle, as a share of their distance from the baseline to it.
        holm: The p-value of ``unseen``, corrected over the confirming comparisons of its world; on CT, where the
            protocol has guide and judges in one family, over both.
        holm_guide: The same of ``guide``, where it is in the family.
    """

    world: str
    degradation: str
    setting: str
    baseline: str
    stage: str
    guide: Estimate
    unseen: Estimate
    transfer: Estimate
    image: Mapping[str, Estimate]
    clean: Estimate
    to_clean: float
    to_oracle: float
    holm: float = math.nan
    holm_guide: float = math.nan


def read(folder: Path) -> list[Row]:
    """The rows of every table below a folder."""
    rows = []
    for path in sorted(folder.glob("*/*.csv")):
        with path.open(newline="") as file:
            rows += [Row(**{**row, "value": float(row["value"])}) for row in csv.DictReader(file)]  # type: ignore[arg-type]
    return rows


def mean_of(rows: Iterable[Row]) -> float:
    """The mean value; NaN of nothing."""
    values = [row.value for row in rows]
    return math.fsum(values) / len(values) if values else math.nan


def estimate(differences: Sequence[float]) -> Estimate:
    """Mean, 95 % t interval and two-sided p-value of paired differences."""
    n = len(differences)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(differences) / n
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    error = float(stats.sem(differences))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Estimate(mean, mean - reach, mean + reach, n, p)


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Ratio of two paired means with Fieller's 95 % interval; no bounds unless the lower one is surely positive, and no
    ratio at all unless it is positive: of a gain that is none, nothing can carry over.

    Reference:
        Fieller, Some Problems in Interval Estimation, J. R. Stat. Soc. B 16, 1954.
    """
    n = len(above)
    a, b = (math.fsum(values) / max(n, 1) for values in (above, below))
    if n == 0 or b <= 0:
        return Estimate(math.nan, math.nan, math.nan, n)
    if n == 1:
        return Estimate(a / b, math.nan, math.nan, 1)
    var_a, var_b = (math.fsum((v - m) ** 2 for v in values) / (n - 1) / n for values, m in ((above, a), (below, b)))
    cov = math.fsum((u - a) * (v - b) for u, v in zip(above, below, strict=True)) / (n - 1) / n
    t2 = float(stats.t.ppf(0.975, n - 1)) ** 2
    square = b * b - t2 * var_b  # of the quadratic whose roots are the bounds
    inside = (a * b - t2 * cov) ** 2 - square * (a * a - t2 * var_a)
    if square <= 0 or inside < 0:
        return Estimate(a / b, math.nan, math.nan, n)
    middle, reach = (a * b - t2 * cov) / square, math.sqrt(inside) / square
    return Estimate(a / b, middle - reach, middle + reach, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and does not count."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, worst = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every setting beside its baseline, the confirming ones first."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.stage, row.world, row.degradation].append(row)
    found = []
    for (stage, _, _), group in sorted(groups.items()):
        if stage == "pilot":
            continue
        settings = dict.fromkeys(row.setting for row in group)
        for setting in settings:
            baseline = _baseline_of(setting, settings)
            if setting not in (*REFERENCES, baseline) and baseline in settings:
                references = [row for row in rows if row.setting in REFERENCES and row[:2] == group[0][:2]]
                found.append(_compare(group, references, setting, baseline))
    complete = (
        one if one.guide.n >= ENOUGH_UNITS else replace(one, stage="exploration") for one in found if one.guide.n
    )
    return _corrected(list(complete))


def _baseline_of(setting: str, settings: Iterable[str]) -> str:
    """What a setting is compared with: the same changes without the task where that was measured, else no changes."""
    kind, at, changes = setting.partition("@")
    baseline = BASELINES.get(kind, "mse")
    return f"{baseline}@{changes}" if at and f"{baseline}@{changes}" in settings else baseline


def _compare(group: Sequence[Row], references: Sequence[Row], setting: str, baseline: str) -> Comparison:
    measured = {(row.seed, row.unit) for row in group if row.setting == setting}  # levels are those of the same people
    group = [row for row in group if (row.seed, row.unit) in measured]
    references = [row for row in references if row.unit in {unit for _, unit in measured}]
    roles = {row.network: row.role for row in group if row.setting == setting and row.network}
    guides, judges = ({name for name, role in roles.items() if role == kind} for kind in ("guide", "judge"))
    paired = {
        (name, metric): _differences(group, setting, baseline, networks, metric)
        for name, networks in (("guide", guides), ("unseen", judges), ("image", {""}))
        for metric in sorted({row.metric for row in group})
    }
    guide, unseen, clean = (
        next((paired[name, prefix + m] for m in TASK_METRICS if paired.get((name, prefix + m))), [])
        for name, prefix in (("guide", ""), ("unseen", ""), ("unseen", "clean_"))
    )
    before, clean_level = (_level(rows, name, judges) for rows, name in ((group, baseline), (references, "clean")))
    known = guides & {row.network for row in references if row.setting == "oracle"}
    guided, ours, oracle = (
        _level(rows, name, known) for rows, name in ((group, baseline), (group, setting), (references, "oracle"))
    )
    gain = estimate(unseen)
    return Comparison(
        *group[0][:2],
        setting,
        baseline,
        group[0].stage,
        estimate(guide),
        gain,
        ratio(unseen, guide) if len(unseen) == len(guide) else Estimate(math.nan, math.nan, math.nan, 0),
        {m: estimate(paired["image", m]) for m in IMAGE_METRICS if paired.get(("image", m))},
        estimate(clean),
        gain.mean / (clean_level - before) if clean_level > before else math.nan,
        (ours - guided) / (oracle - guided) if oracle > guided else math.nan,
    )


def _differences(group: Sequence[Row], setting: str, baseline: str, networks: set[str], metric: str) -> list[float]:
    """The paired difference of each unit: of each patient over the seeds, or of each seed where nobody is a patient."""
    values: dict[str, dict[tuple[str, Unit], float]] = {setting: {}, baseline: {}}
    for row in group:
        if row.setting in values and row.metric == metric and row.network in networks:
            values[row.setting][row.network, (row.seed, row.unit)] = row.value
    by_unit: dict[str, list[float]] = defaultdict(list)
    for key in values[setting].keys() & values[baseline].keys():
        seed, unit = key[1]
        by_unit[unit or f"seed {seed}"].append(values[setting][key] - values[baseline][key])
    return [math.fsum(sorted(found)) / len(found) for _, found in sorted(by_unit.items())]


def _level(rows: Iterable[Row], setting: str, networks: set[str]) -> float:
    kept = (r for r in rows if r.setting == setting and r.network in networks and r.metric in TASK_METRICS)
    return mean_of(kept)


def _corrected(found: list[Comparison]) -> list[Comparison]:
    for world in {one.world for one in found}:
        family = [i for i, one in enumerate(found) if one.world == world and one.stage == "confirming"]
        of_guides = [found[i].guide.p for i in family] if world.startswith("ct") else []
        corrected = holm([found[i].unseen.p for i in family] + of_guides)
        for place, i in enumerate(family):
            guide = corrected[len(family) + place] if of_guides else math.nan
            found[i] = replace(found[i], holm=corrected[place], holm_guide=guide)
    return found
