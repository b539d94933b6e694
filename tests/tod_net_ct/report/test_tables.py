"""The three tables, three ways to write each, and what their numbers say in words."""

from __future__ import annotations

import csv
import io

import pytest

from examples.tod_net_ct.evaluation import scores
from examples.tod_net_ct.report.answers import answers, family_note, number, sentence
from examples.tod_net_ct.report.paper import departures
from examples.tod_net_ct.report.tables import as_csv, latex, markdown, tables
from examples.tod_net_ct.run import PRESETS
from tests.tod_net_ct.doubles import made_up_rows, made_up_summary


@pytest.fixture(scope="module")
def summary() -> dict:
    return made_up_summary()


def test_the_best_is_bold_and_the_differing_are_marked(summary) -> None:
    found = {table.name: table for table in tables(summary, ("unet", "vnet"))}
    cells = dict(found["table2"].rows)
    assert [row for row, _ in found["table2"].rows] == ["normal_dose", "none", "mse_wgan", "tod_net"]
    assert cells["tod_net"][0].best and not cells["normal_dose"][0].best, "normal dose is the ceiling, no contestant"
    assert cells["mse_wgan"][0].mark == "†" and not cells["tod_net"][0].mark
    rmse = {row: cells[1] for row, cells in found["table1"].rows}
    assert rmse["tod_net"].best and not rmse["none"].best, "the lowest RMSE"
    assert [row for row, cells in found["table3"].rows if cells[0].mark] == ["mse_wgan", "tod_net"]


def test_three_ways_to_write_a_table(summary) -> None:
    table = next(table for table in tables(summary, ("unet", "vnet")) if table.name == "table2")
    mean = summary["means"]["low"]["tod_net"]["unet_dice"]["mean"]
    assert f"**{mean:.1f} ± " in markdown(table) and "| No denoiser |" in markdown(table)
    tex = latex(table)
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\textbf{", r"Dice (\%)"))
    assert tex.count("{") == tex.count("}") and "±" not in tex and "†" not in tex
    rows = {(r["denoiser"], r["column"]): r for r in csv.DictReader(io.StringIO(as_csv(table)))}
    assert float(rows["tod_net", "unet_dice"]["mean"]) == pytest.approx(mean, rel=1e-5)
    assert rows["tod_net", "unet_dice"]["best"] == "1" and rows["mse_wgan", "unet_dice"]["significant"] == "1"


def test_latex_groups_columns(summary) -> None:
    tex = latex(next(table for table in tables(summary, ("unet", "vnet")) if table.name == "table1"))
    assert r"\multicolumn{3}{c}{Region of interest}" in tex and r"\cmidrule(lr){5-7}" in tex


def test_what_the_words_say(summary) -> None:
    read = answers(summary, ("unet",), ("unet", "vnet"))
    guided, unseen = list(read.values())[:2]
    assert guided[1].startswith("Minus MSE-WGAN: U-Net +0.9") and "significantly better in 1 of 1" in guided[1]
    assert "V-Net" in unseen[1] and "U-Net" not in unseen[1]


def test_the_words_fall_the_other_way_too(summary) -> None:
    turned = [g | {"mean": -g["mean"], "better": not g["better"]} for g in summary["comparisons"]]
    assert (
        "significantly worse in 1 of 1"
        in list(answers(summary | {"comparisons": turned}, ("unet",), ("unet",)).values())[0][1]
    )


def test_too_few_cases_are_said_to_be_too_few(summary) -> None:
    few = scores.comparisons(made_up_rows(4), ("mse_wgan", "tod_net"), ("unet", "vnet"))
    assert "no difference can be significant in Table 1, Table 2, " in family_note({"comparisons": few})
    assert "no difference can be significant" not in family_note(summary)
    read = answers(summary | {"comparisons": few}, ("unet",), ("unet", "vnet"))
    assert all("4 cases are too few to test" in line for lines in read.values() for line in lines)


def test_a_p_value_is_never_zero(summary) -> None:
    assert number(1e-9) == "< 0.0001" and number(0.0123) == "0.012" and number(None) == ""
    gap = next(gap for gap in summary["comparisons"] if gap["key"] == "unet_dice" and gap["theirs"] == "mse_wgan")
    assert sentence(gap).startswith("U-Net Dice (%): TOD-Net minus MSE-WGAN +")


def test_departures_from_the_paper() -> None:
    found = {name: (own, stated) for name, own, stated in departures(PRESETS["demo"])}
    assert found["optimizer"] == ("adam", "rmsprop") and found["shape"] == ("16, 128, 128", "32, 256, 256")
    assert "clip" not in found, "the demo clips as the paper does"
