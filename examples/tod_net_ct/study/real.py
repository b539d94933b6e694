"""The study's denoisers on real scans: pairs of quarter and full dose, and a liver that a person has outlined.

``python -m examples.tod_net_ct study --pairs FOLDER --scans FOLDER`` takes the networks of the study's first seed. They
have seen phantoms alone; on the pairs each is also trained further on one patient, and tested on the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..dose import degrade
from ..evaluation import Row, compare, device_of, judges, measure_case, measure_pairs
from ..run import PRESETS, Settings, progress, results_of, write_text
from ..scans import Cases, find_cases, prepare, read_scan, split_patients
from ..training import FILTERS, RECIPES, parse, restorer, train_denoiser

FINE_TUNING_STEPS = 60
FINE_TUNING_SHAPE = (1, 256, 256)  # the pairs are single slices
FINE_TUNED = " fine-tuned"  # behind a denoiser's name
SCRATCH = "scratch"  # TOD-Net's denoiser, trained on the other patient's pairs alone
FURTHER = {"tod_net": "mse", "sacnn": "sacnn_mse", "cnn": "cnn_mse"}  # network -> the recipe with MSE alone
DOSE = ("i0_photons", "kernel", "n_views")  # of the paper's preset, which is made for millimetre voxels


def real_pairs(settings: Settings, names: Sequence[str], data: Path, output: Path, results: Path) -> None:
    """Write ``pairs/<patient>.json``: the patient's pairs through every denoiser, before and after fine-tuning."""
    run = output / f"seed-{settings.seed}"
    patients = sorted({case.patient for case in find_cases(data) if case.low is not None})
    if len(patients) != 2:
        raise ValueError(f"{data}: expected pairs of two patients, one to train on and one to test, got {patients}")
    for tested in patients:
        (other,) = set(patients) - {tested}
        restorers = {name: restorer(name, settings, run) for name in names}
        for name in (*(n for n in names if n not in FILTERS), SCRATCH):
            label = name if name == SCRATCH else name + FINE_TUNED
            restorers[label] = fine_tuned(name, settings, run, data, other, output / f"real-{other}" / name)
        rows = measure_pairs(data, restorers, tested)
        write_text(results / "pairs" / f"{tested}.json", json.dumps(compare(rows), indent=1) + "\n")


def fine_tuned(
    name: str, settings: Settings, run: Path, data: Path, patient: str, folder: Path
) -> Callable[[Tensor], Tensor]:
    """A denoiser trained further on one patient's pairs with MSE alone, for they have no labels."""
    kind = "mse" if name == SCRATCH else parse(name, settings)[0]
    recipe = FURTHER[RECIPES[kind].network]
    start = "" if name == SCRATCH else str(run / "denoisers" / name / "best.pt")
    further = replace(
        settings, data=str(data), n_train=1, n_validation=1, n_test=1, reuse=True, shape=FINE_TUNING_SHAPE,
        voxel_mm=_voxel_mm(data, patient), seed=_seed_that_trains_on(patient, settings, data),
        steps=FINE_TUNING_STEPS, validate_every=FINE_TUNING_STEPS, start_from=start, tuned=(),
    )  # fmt: skip
    prepare(further, folder)
    degrade(further, folder)
    train_denoiser(recipe, further, folder)
    return restorer(recipe, replace(further, start_from=""), folder)


def real_scans(settings: Settings, names: Sequence[str], data: Path, output: Path) -> list[Row]:
    """Rows as the study's: every scan of a folder at both doses, through every denoiser, judged by every network.

    The networks work on the voxels that they were trained with; the denoisers on the scan's own, as in the paper.
    """
    run, folder = output / f"seed-{settings.seed}", output / "real-scans"
    paper = {field: getattr(PRESETS["paper"], field) for field in DOSE}
    n = len(find_cases(data))
    scans = replace(settings, data=str(data), n_train=1, n_validation=1, n_test=n, reuse=True, **paper)
    prepare(scans, folder)
    degrade(scans, folder)
    device = device_of(settings)
    networks = judges(settings, run, device)
    cases = Cases(folder, "test")
    restorers: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda volume_hu: volume_hu}
    restorers |= {name: restorer(name, settings, run, device) for name in names}
    about = results_of(folder / "cases")["cases"]
    rows: list[Row] = []
    for i in progress(range(len(cases)), "real scans"):
        rows += measure_case(cases, i, settings, restorers, networks, device)
    return [{**row, "case": about[row["case"]]["origin"]} for row in rows]


def _voxel_mm(data: Path, patient: str) -> tuple[float, float, float]:
    scan = next(case.scan for case in find_cases(data) if case.patient == patient)
    dz, dy, dx = read_scan(scan).voxel_mm
    return float(dz), float(dy), float(dx)


def _seed_that_trains_on(patient: str, settings: Settings, data: Path) -> int:
    """Which patient trains is drawn by the seed, as in every split: take the first that draws this one."""
    patients = [case.patient for case in find_cases(data)]
    few = replace(settings, data=str(data), n_train=1, n_validation=1, n_test=1, reuse=True)
    return next(s for s in range(1000) if split_patients(patients, replace(few, seed=s))["train"] == [patient])
