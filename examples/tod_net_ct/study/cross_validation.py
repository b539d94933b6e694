"""Every patient of a data set tested once per seed: task networks, oracles and denoisers, measured in long CSV files.

An experiment is one YAML file, written before its numbers: who is tested in which fold, doses, denoisers, seeds, and
the settings that all share. What is measured lies in one small file for each dose, fold, seed and denoiser. The command
goes on where it stopped, in the order of the file: seeds, within a seed doses, within a dose folds.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..dose import WINDOW_HU, degrade
from ..evaluation import device_of, judges
from ..inference import segment
from ..metrics import dice_scores, image_quality
from ..run import PRESETS, Settings, results_of, write_text
from ..scans import Cases, coarser_copy, prepare
from ..training import load_task, parse, restorer, train_denoiser, train_task
from .by_patient import by_patient

COLUMNS = (
    "world", "task", "dose", "fold", "seed", "patient", "case", "denoiser", "input", "network", "role", "metric",
    "value",
)  # fmt: skip
UNTRAINED = ("none", "oracle")  # the image as it comes, to the task networks and to those trained on low dose


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says.

    Attributes:
        task: what is segmented, for people.
        patients: the cases of every patient.
        folds: for each fold its `test` and `validation` patients; all others train.
        doses: the share of the scan's own dose that is left, by name, in the order of work.
        denoisers: names as in a run, in the order of work.
        seeds: of the denoisers, in the order of work; task networks and oracles are trained once a fold.
        oracles: the task networks that are also trained on low dose.
        voxel_mm: onto which the scans are averaged; None leaves them as they are.
        settings: of every run.
        left_out: cases of the data that nobody is tested or trained on.
    """

    task: str
    patients: dict[str, list[str]]
    folds: dict[str, dict[str, list[str]]]
    doses: dict[str, float]
    denoisers: list[str]
    seeds: list[int]
    oracles: list[str]
    voxel_mm: tuple[float, float, float] | None
    settings: Settings
    left_out: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("experiment", type=Path, help="a YAML file such as results/ct/lits_liver/experiment.yaml")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the scans, as LiTS has them")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the measurements (default: beside the experiment)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="these alone (default: the experiment's)")


def main(args: argparse.Namespace) -> int:
    """Measure what is missing."""
    experiment = read_experiment(args.experiment)
    if args.seeds:
        experiment = replace(experiment, seeds=args.seeds)
    results, end = args.results or args.experiment.parent, time.monotonic() + 60 * args.minutes
    for done in cross_validate(experiment, args.data, args.output, results):
        print(f"measured {done}", flush=True)
        by_patient(results / "measurements", results.with_suffix(".csv"), experiment.folds)
        if time.monotonic() > end:
            print(f"{results}: stopped after {args.minutes:g} minutes; the same command goes on from here")
            break
    return 0


def read_experiment(path: Path) -> Experiment:
    """The experiment of a file.

    Raises:
        ValueError: the file is no experiment, or a patient is tested twice or never.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
        voxel_mm = content.pop("voxel_mm")
        preset = PRESETS[content.pop("preset")]
        changes = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in content["settings"].items()}
        content["settings"] = preset.with_overrides(changes)
        experiment = Experiment(voxel_mm=tuple(voxel_mm) if voxel_mm else None, **content)
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected an experiment as results/ct/lits_liver/experiment.yaml, got {error}"
        ) from error
    tested = sorted(patient for fold in experiment.folds.values() for patient in fold["test"])
    if tested != sorted(experiment.patients):
        raise ValueError(f"{path}: expected every patient in the test of one fold, got {', '.join(tested)}")
    return experiment


def cross_validate(experiment: Experiment, data: Path, output: Path, results: Path) -> Iterator[Path]:
    """Measure what is missing, in the experiment's order; every file that was written is yielded."""
    scans = coarser_copy(data, output / "scans", experiment.voxel_mm, experiment.patients, experiment.left_out)
    for seed in experiment.seeds:
        for dose in experiment.doses:
            for fold in experiment.folds:
                yield from _one_unit(experiment, scans, output, results, dose, fold, seed)


def _one_unit(
    experiment: Experiment, scans: Path, output: Path, results: Path, dose: str, fold: str, seed: int
) -> Iterator[Path]:
    own = experiment.folds[fold]
    settings = replace(
        experiment.settings, data=str(scans), test_patients=tuple(own["test"]),
        validation_patients=tuple(own["validation"]), dose_fraction=experiment.doses[dose],
    )  # fmt: skip
    folder = results / "measurements" / dose / f"fold-{fold}"
    todo: list[tuple[str, int | None, Path]] = [(name, None, folder / f"{name}.csv") for name in UNTRAINED]
    todo += [(name, seed, folder / f"seed-{seed}" / f"{_plain(name)}.csv") for name in experiment.denoisers]
    todo = [item for item in todo if not item[2].exists()]
    if not todo:
        return
    run = _make_ready(settings, output / f"fold-{fold}", dose)
    for name, own_seed, path in todo:
        if name == "oracle":
            for network in experiment.oracles:
                train_task(network, replace(settings, task_dose="low"), run)
        trained = name if own_seed is None else f"{name}{';' if '@' in name else '@'}seed={own_seed}"
        curve = [] if name in UNTRAINED else _curve(train_denoiser(trained, settings, run) / "log.csv")
        about = {"world": "ct", "task": experiment.task, "dose": dose, "fold": fold, "seed": own_seed, "denoiser": name}
        write_text(path, _as_csv([about | row for row in [*_measure(trained, experiment, settings, run), *curve]]))
        yield path


def _make_ready(settings: Settings, fold: Path, dose: str) -> Path:
    """The fold's cases and task networks, which all doses share, seen from the run of one dose."""
    prepare(settings, fold)
    run = fold / dose
    for shared in ("cases", "task"):
        (fold / shared).mkdir(parents=True, exist_ok=True)
        if not (run / shared).exists():
            run.mkdir(exist_ok=True)
            os.symlink(Path("..") / shared, run / shared)
    degrade(settings, run)
    for network in settings.task_networks:
        train_task(network, settings, run)
    return run


@torch.no_grad()
def _measure(name: str, experiment: Experiment, settings: Settings, run: Path) -> Iterator[dict[str, Any]]:
    """One row for each number: image quality, and Dice of every network, on both doses."""
    device = device_of(settings)
    networks = judges(settings, run, device)
    if name == "oracle":
        networks = {n: load_task(replace(settings, task_dose="low"), run, n).to(device) for n in experiment.oracles}
    restore = (lambda volume_hu: volume_hu) if name in UNTRAINED else restorer(name, settings, run, device)
    cases, people = Cases(run, "test"), results_of(run / "cases")["cases"]
    guides = settings.guides if name in UNTRAINED else parse(name, settings)[1].guides
    for i in range(len(cases)):
        normal_hu, low_hu, mask = cases.in_hu(i)
        voxel_mm, known = cases.voxel_mm_of(i), people[cases.paths[i].stem]
        for given, given_hu in (("low", low_hu), ("normal", normal_hu)):
            row = {"patient": known["patient"], "case": known["origin"], "input": given}
            image = restore(given_hu)
            if (name, given) != ("none", "normal") and name != "oracle":
                for metric, value in image_quality(image, normal_hu, mask).items():
                    yield row | {"network": "", "role": "image", "metric": metric, "value": value}
            for network, judge in networks.items():
                found = segment(judge, image, voxel_mm, settings.voxel_mm, device=device)
                role = "oracle" if name == "oracle" else "guide" if network in guides else "unseen"
                for metric, value in dice_scores(found, mask, cases.class_names).items():
                    yield row | {"network": network, "role": role, "metric": metric, "value": 100 * value}


def _curve(log: Path) -> list[dict[str, Any]]:
    """How the error on the validation patient went while a denoiser was trained: one row for each look."""
    if not log.is_file():  # a filter is not trained
        return []
    lower, upper = WINDOW_HU
    about = {"patient": "", "case": "", "input": "low", "network": "", "role": "training"}
    with log.open(newline="") as file:
        looks = [(row["step"], float(row["validation/mse"])) for row in csv.DictReader(file) if row["validation/mse"]]
    return [
        about | {"metric": f"validation_rmse_hu_at_{step}", "value": (upper - lower) * math.sqrt(mse)}
        for step, mse in looks
    ]


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """Four decimals are far below the noise of any of these numbers."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "value": f"{row['value']:.4f}"} for row in rows)
    return text.getvalue()


def _plain(name: str) -> str:
    return name.replace("@", "-").replace("=", "_").replace(";", "-").replace("+", "_")
