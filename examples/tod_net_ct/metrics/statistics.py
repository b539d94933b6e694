"""Statistics for cases that are paired, within one training and over several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean paired difference, its 95 % t interval, and the p of the paired t and Wilcoxon signed-rank tests.

    The same cases went through both, so the tests are paired (the published code's are not). A case where either
    number is not finite is left out; `n` counts the others.
    """
    from scipy import stats

    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    result = {"mean": float((a - b).mean()) if len(a) else math.nan, "n": len(a)}
    unknown = {"low": math.nan, "high": math.nan, "t_p": math.nan, "wilcoxon_p": math.nan}
    if len(a) < 2:
        return result | unknown
    if not (a - b).any():  # no difference anywhere: nothing to test, and nothing that speaks against equality
        return result | {"low": 0.0, "high": 0.0, "t_p": 1.0, "wilcoxon_p": 1.0}
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    return result | {
        "low": float(interval.low), "high": float(interval.high),
        "t_p": float(test.pvalue), "wilcoxon_p": float(stats.wilcoxon(a, b).pvalue),
    }  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for one family of tests; a NaN stays NaN and counts for nothing.

    Reference:
        S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979.
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def paired_over_seeds(scores: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """The mean paired difference over training seeds and test cases, with two 95 % intervals.

    `by_seed` asks what another training would give: a t interval over the seeds' mean differences, one number per
    seed. `by_case` asks what other patients would give with these very networks: cases are drawn anew within each
    seed, with Satterthwaite's degrees of freedom; it says nothing about another training and is usually narrower. It
    takes the cases of different seeds as independent, which holds where every seed has its own test cases.

    Args:
        scores: for every seed, our numbers and theirs on the same cases.

    Returns:
        `mean` (of the seeds' means, so that each seed counts the same), `n_seeds`, `n_cases` (over all seeds),
        `n_seeds_above` (whose mean difference is above zero), `by_seed_low`, `by_seed_high`, `by_seed_p`,
        `by_case_low`, `by_case_high`, `by_case_p`; NaN where there are fewer than two to estimate from.

    Raises:
        ValueError: there is no seed, or one without a case that both measured.
    """
    from scipy import stats

    differences = {}
    for seed, (ours, theirs) in scores.items():
        difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        differences[seed] = difference[np.isfinite(difference)]
        if not len(differences[seed]):
            raise ValueError(f"seed {seed}: expected a case measured on both sides, got none; leave this seed out")
    if not differences:
        raise ValueError("paired_over_seeds: expected at least one seed, got none; run the study first")
    means = np.array([d.mean() for d in differences.values()])
    n = np.array([len(d) for d in differences.values()])
    result = {
        "mean": float(means.mean()), "n_seeds": len(means), "n_cases": int(n.sum()),
        "n_seeds_above": int((means > 0).sum()),
    }  # fmt: skip
    seed_error, seed_freedom = math.nan, math.nan
    if len(means) > 1:
        seed_error, seed_freedom = float(means.std(ddof=1)) / math.sqrt(len(means)), len(means) - 1
    case_error, case_freedom = math.nan, math.nan
    if (n > 1).all():
        parts = np.array([d.var(ddof=1) for d in differences.values()]) / n
        case_error = math.sqrt(float(parts.sum())) / len(n)
        case_freedom = float(parts.sum() ** 2 / (parts**2 / (n - 1)).sum()) if parts.any() else math.nan
    for name, error, freedom in (("by_seed", seed_error, seed_freedom), ("by_case", case_error, case_freedom)):
        reach = float(stats.t.ppf(0.975, freedom)) * error if error else 0.0
        p = 2 * float(stats.t.sf(abs(result["mean"]) / error, freedom)) if error else float(result["mean"] == 0)
        result |= {f"{name}_low": result["mean"] - reach, f"{name}_high": result["mean"] + reach, f"{name}_p": p}
    return result


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (n - 1) and count of the finite ones."""
    known = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    return {
        "mean": float(known.mean()) if len(known) else math.nan,
        "sd": float(known.std()) if len(known) > 1 else math.nan,
        "n": len(known),
    }
