"""The demo as an experiment: several seeds, every denoiser, every task network, and the answers with intervals.

Each seed draws its own phantoms and its own initial weights. What is measured is kept in one small CSV for each seed
and denoiser, so a study can be stopped, spread over machines, and taken up again; `summary.py` reads them all.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..dose import degrade
from ..evaluation import Row, device_of, judges, measure_case
from ..run import PRESETS, Settings, progress, read_json, results_of, write_text
from ..scans import Cases, prepare
from ..training import RECIPES, restorer, train_denoiser, train_task
from .real import real_pairs, real_scans
from .results import RESULTS

TUNING = {"share_adv": (0.3, 0.03, 0.003)}  # the one knob that all of the compared denoisers have
ABLATIONS = (
    "mse_wgan@balance=false",
    "tod_net@balance=false",  # the paper's fixed weights
    "tod_net@share_task=8",
    "tod_net@guides=unet+res_unet",
    "label_free",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument(
        "--denoisers", nargs="+", metavar="NAME", help="default: those of the paper, then the ablations"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measurements and their summary")
    parser.add_argument("--tune", action="store_true", help="compare settings on the first seed's validation cases")
    parser.add_argument("--pairs", type=Path, metavar="FOLDER", help="also real pairs of low and normal dose")
    parser.add_argument("--scans", type=Path, metavar="FOLDER", help="also real scans with masks, as LiTS has them")
    parser.add_argument("--summary-only", action="store_true", help="only read what was measured and write it up")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting")


def main(args: argparse.Namespace) -> int:
    """Train and measure what is missing, then write it up."""
    from .summary import summarise

    if min(args.seeds) < 0:
        raise ValueError(f"--seeds: expected numbers from 0 on, got {min(args.seeds)}; for example --seeds 0 1 2")
    settings = PRESETS["study"].with_overrides(dict(item.partition("=")[::2] for item in args.set))
    if args.tune:
        names = args.denoisers or [n for n in settings.denoisers if "adv" in RECIPES[n].terms]
        print(json.dumps(tune(settings, names, args.output, args.results), indent=1))
        return 0
    if not args.summary_only:
        names = args.denoisers or (*settings.denoisers, *ABLATIONS)
        study(settings, args.seeds, names, args.output, args.results)
        first = replace(settings, seed=args.seeds[0])
        if args.pairs:
            real_pairs(first, settings.denoisers, args.pairs, args.output, args.results)
        if args.scans:
            rows = real_scans(first, settings.denoisers, args.scans, args.output)
            write_text(args.results / "scans.csv", as_csv(rows))
    print(summarise(args.results))
    return 0


def study(settings: Settings, seeds: Sequence[int], names: Sequence[str], output: Path, results: Path) -> None:
    """Every denoiser for every seed, the paper's own first; what was measured before is skipped."""
    write_text(results / "settings.yaml", settings.to_yaml())
    rounds = [[n for n in names if n not in ABLATIONS], [n for n in names if n in ABLATIONS]]
    for group in rounds:
        for seed in seeds:
            one = replace(settings, seed=seed)
            run = output / f"seed-{seed}"
            missing = [n for n in ("none", *group) if not file_of(results, seed, n).exists()]
            if missing:
                make_ready(one, run, one.task_networks)
            for name in missing:
                if name != "none":
                    train_denoiser(name, one, run)
                write_text(file_of(results, seed, name), as_csv(measure(name, one, run)))


def tune(settings: Settings, names: Sequence[str], output: Path, results: Path) -> dict[str, Any]:
    """Train each denoiser with each value of `TUNING`, compare the errors on the validation cases, and write
    ``tuning.json``: the same grid, the same number of trainings and the same rule for all.
    """
    run = output / f"seed-{settings.seed}"
    make_ready(settings, run, settings.guides)
    ((field, values),) = TUNING.items()
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        for value in values:
            folder = train_denoiser(f"{name}@{field}={value}", settings, run)
            found[name][str(value)] = round(results_of(folder)["best_validation"], 7)
    found = tuned_before(results) | found  # another process may have written its part meanwhile
    best = {name: min(errors, key=errors.__getitem__) for name, errors in found.items()}
    tuning = {
        "seed": settings.seed, "field": field, "validation_mse": found,
        "tuned": [f"{name}@{field}={value}" for name, value in best.items()],
    }  # fmt: skip
    write_text(results / "tuning.json", json.dumps(tuning, indent=1) + "\n")
    return tuning


def tuned_before(results: Path) -> dict[str, dict[str, float]]:
    """The validation errors that ``tuning.json`` holds; empty if there is none.

    Raises:
        ValueError: the file is damaged; to write over it would lose what another process found.
    """
    path = results / "tuning.json"
    if not path.exists():
        return {}
    mend = "remove it to tune anew"
    found = read_json(path, mend).get("validation_mse")
    if not isinstance(found, dict) or not all(isinstance(errors, dict) for errors in found.values()):
        raise ValueError(f"{path}: expected the errors of a tuning, got a file without 'validation_mse'; {mend}")
    return found


def make_ready(settings: Settings, run: Path, networks: Sequence[str]) -> None:
    """What every denoiser of a seed stands on: the cases at both doses, and trained task networks."""
    prepare(settings, run)
    degrade(settings, run)
    for network in networks:
        train_task(network, settings, run)


def measure(name: str, settings: Settings, run: Path) -> list[Row]:
    """One denoiser on every test case at both doses; "none" measures the images as they come."""
    device = device_of(settings)
    networks = judges(settings, run, device)
    restore = (lambda volume_hu: volume_hu) if name == "none" else restorer(name, settings, run, device)
    cases = Cases(run, "test")
    rows: list[Row] = []
    for i in progress(range(len(cases)), f"measure {name}"):
        rows += measure_case(cases, i, settings, {name: restore}, networks, device)
    return rows


def file_of(results: Path, seed: int, name: str) -> Path:
    """Where the measurements of one denoiser and seed are kept."""
    plain = name.replace("@", "-").replace("=", "_").replace(";", "-").replace("+", "_")
    return results / "measurements" / f"seed-{seed}" / f"{plain}.csv"


def as_csv(rows: Sequence[Row]) -> str:
    """Four decimals are far below the noise of any of these numbers."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()
