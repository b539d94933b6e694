"""What a cross-validation measured, as means over each patient's scans: the table that the page of evidence reads."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from ..run import write_text
from ..training import RECIPES

COLUMNS = ("world", "degradation", "setting", "stage", "seed", "unit", "network", "role", "metric", "value")
METRICS = {"dice": "dice", "roi_rmse_hu": "roi_rmse_hu", "whole_rmse_hu": "rmse_hu", "whole_psnr_db": "psnr_db"}
LEAST_SEEDS = 3  # below, or where a fold is missing, a dose's rows are exploration


def by_patient(measurements: Path, table: Path, folds: Collection[str]) -> Path:
    """Write the table of everything below `measurements`.

    Args:
        measurements: files as `cross_validate` writes them.
        table: the CSV file to write.
        folds: all of the experiment's; a dose with fewer, or with fewer than three seeds in one, is exploration.
    """
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    complete = _complete(measurements, folds)
    for path in sorted(measurements.rglob("*.csv")):
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if None in (*row, *row.values()):
                        raise ValueError("a line is not whole")
                    for key in _keys(row, complete):
                        values[key].append(float(row["value"]))
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            raise ValueError(
                f"{path}: expected rows of measurements, got a damaged file; remove it, and it is measured again"
            ) from error
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((*key, f"{sum(found) / len(found):.4f}") for key, found in sorted(values.items()))
    write_text(table, text.getvalue())
    return table


def _keys(row: dict[str, str], complete: Collection[str]) -> Iterable[tuple[str, ...]]:
    """Under which settings a measured number stands; that of the image as it comes under its dose's name."""
    metric = METRICS.get(row["metric"])
    setting, prefix = row["denoiser"], "clean_" if row["input"] == "normal" else ""
    if setting == "none":
        setting, prefix = {"low": "degraded", "normal": "clean"}[row["input"]], ""
    if metric is None or (setting == "oracle" and prefix):
        return
    recipe = RECIPES.get(setting.partition("@")[0])
    guided = recipe is not None and recipe.is_guided and row["role"] == "guide"
    role = "image" if not row["network"] else "guide" if guided else "judge"
    stage = "confirming" if row["dose"] in complete else "exploration"
    world = f"{row['world']}_{row['task']}"
    yield world, row["dose"], setting, stage, row["seed"], row["patient"], row["network"], role, prefix + metric


def _complete(measurements: Path, folds: Collection[str]) -> set[str]:
    """The doses that were measured in every fold over enough seeds."""
    seeds: dict[tuple[str, str, str], set[str]] = defaultdict(set)  # of each denoiser in each fold at each dose
    for path in measurements.glob("*/fold-*/seed-*/*.csv"):
        dose, fold, seed, name = path.relative_to(measurements).parts
        seeds[dose, fold.removeprefix("fold-"), name].add(seed)
    found = set()
    for dose in {dose for dose, _, _ in seeds}:
        names = {name for other, _, name in seeds if other == dose}
        enough = [len(seeds[dose, fold, name]) >= LEAST_SEEDS for fold in folds for name in names]
        if all(enough):
            found.add(dose)
    return found
