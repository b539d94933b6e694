"""Patients, not scans, are what a table of a cross-validation counts; what is not complete does not confirm."""

from __future__ import annotations

import csv

import pytest

from examples.tod_net_ct.study.by_patient import by_patient

HEAD = "world,task,dose,fold,seed,patient,case,denoiser,input,network,role,metric,value\n"


def row(denoiser, value, *, fold="A", seed="0", patient="p1", case="c1", given="low", network="unet", metric="dice"):
    role = "image" if not network else "guide" if network == "unet" else "unseen"
    return f"ct,liver,heavy,{fold},{seed},{patient},{case},{denoiser},{given},{network},{role},{metric},{value}\n"


def table(tmp_path, files, folds=("A",)):
    for name, rows in files.items():
        path = tmp_path / "measurements" / "heavy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + "".join(rows))
    found = by_patient(tmp_path / "measurements", tmp_path / "table.csv", folds)
    with found.open() as file:
        return {
            (r["setting"], r["seed"], r["unit"], r["network"], r["role"], r["metric"]): (float(r["value"]), r["stage"])
            for r in csv.DictReader(file)
        }


def test_a_patients_scans_are_averaged_and_the_image_as_it_comes_has_its_doses_name(tmp_path):
    found = table(
        tmp_path,
        {
            "fold-A/none.csv": [
                row("none", 40, seed=""),
                row("none", 60, seed="", case="c2"),
                row("none", 90, seed="", given="normal"),
                row("none", 30, seed="", network="", metric="roi_rmse_hu"),
                row("none", 30, seed="", network="", metric="roi_ssim"),
            ],
            "fold-A/oracle.csv": [row("oracle", 80, seed=""), row("oracle", 85, seed="", given="normal")],
            "fold-A/seed-0/tod_net.csv": [row("tod_net", 70), row("tod_net", 88, given="normal", network="vnet")],
            "fold-A/seed-0/label_free.csv": [row("label_free@share_task=1", 66)],
            "fold-A/seed-0/mse.csv": [row("mse", 65)],
        },
    )
    assert {key: value for key, (value, _) in found.items()} == {
        ("degraded", "", "p1", "unet", "judge", "dice"): 50,
        ("clean", "", "p1", "unet", "judge", "dice"): 90,
        ("degraded", "", "p1", "", "image", "roi_rmse_hu"): 30,
        ("oracle", "", "p1", "unet", "judge", "dice"): 80,
        ("tod_net", "0", "p1", "unet", "guide", "dice"): 70,
        ("tod_net", "0", "p1", "vnet", "judge", "clean_dice"): 88,
        ("label_free@share_task=1", "0", "p1", "unet", "guide", "dice"): 66,
        ("mse", "0", "p1", "unet", "judge", "dice"): 65,
    }


@pytest.mark.parametrize(
    ("seeds", "folds", "stage"),
    [((0, 1, 2), "A", "confirming"), ((0, 1), "A", "exploration"), ((0, 1, 2), "AB", "exploration")],
    ids=["all", "too few seeds", "a fold is missing"],
)
def test_only_all_folds_over_three_seeds_confirm(tmp_path, seeds, folds, stage):
    files = {f"fold-A/seed-{s}/{name}.csv": [row(name, 50, seed=s)] for s in seeds for name in ("mse", "tod_net")}
    assert {found for _, found in table(tmp_path, files, folds).values()} == {stage}


@pytest.mark.parametrize(
    "line",
    ["ct,liver,heavy,A,0,p1,c1,mse,low,unet\n", row("mse", "7O"), row("mse", "7,0")],
    ids=["cut", "a letter", "a comma"],
)
def test_a_damaged_line_is_not_left_out(tmp_path, line):
    with pytest.raises(
        ValueError, match="mse.csv: expected rows of measurements, got a damaged file; remove it, and it"
    ):
        table(tmp_path, {"fold-A/seed-0/mse.csv": [row("mse", 50), line]})
