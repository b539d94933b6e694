"""The page's first screen: one sentence from the summary, and what a reader must not be left to find out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from examples.tod_net_ct.report.opening import (  # noqa: E402
    cautions,
    opening_columns,
    opening_figure,
    opening_sentence,
    whole_image_sentence,
)
from examples.tod_net_ct.report.plots import Pictures  # noqa: E402
from examples.tod_net_ct.report.tables import tables  # noqa: E402
from examples.tod_net_ct.run import PRESETS  # noqa: E402

from ..doubles import made_up_summary  # noqa: E402

DEMO = replace(PRESETS["demo"], task_networks=("unet", "vnet"), denoisers=("mse_wgan", "tod_net"))


@pytest.fixture
def summary():
    return made_up_summary()


def test_the_sentence_has_the_guide_s_dice_of_both_doses_and_both_denoisers(summary):
    means = summary["means"]
    numbers = [means["normal"]["none"], means["low"]["none"], means["low"]["mse_wgan"], means["low"]["tod_net"]]
    normal, low, wgan, tod = (f"{n['unet_dice']['mean']:.1f}" for n in numbers)
    assert opening_sentence(summary, DEMO, "unet") == (
        f"U-Net finds the liver with a Dice of {normal} % on normal dose, {low} on low dose, {wgan} behind MSE-WGAN, "
        f"{tod} behind TOD-Net (mean of 12 test cases)."
    )


def test_without_masks_the_sentence_has_the_image_s_error(summary):
    for dose in summary["means"].values():
        for numbers in dose.values():
            numbers["unet_dice"]["mean"] = None
    text = opening_sentence(summary, DEMO, "unet")
    assert text.startswith("Distance from normal dose over the whole image (RMSE, mean of 12 cases): ")
    assert text.count(" HU ") == 3


def test_a_good_run_has_nothing_to_warn_of(summary):
    assert cautions(summary, DEMO) == []


def test_a_useless_judge_a_smoke_run_and_few_cases_are_told(summary):
    summary["means"]["normal"]["none"]["vnet_dice"]["mean"] = 12.8
    summary["n_cases"] = 3
    smoke, few, judge = cautions(summary, replace(DEMO, steps=4))
    assert smoke.startswith("A smoke run: 4 training steps for each denoiser show that everything works, and nothing")
    assert few.startswith("3 test cases are too few")
    assert judge.startswith("V-Net is no judge here: on normal dose itself it reaches a Dice of 12.8 %.")


def test_a_whole_image_that_got_worse_is_told_in_words(summary):
    assert whole_image_sentence(summary) == ""
    gap = next(g for g in summary["comparisons"] if g["key"] == "whole_rmse_hu" and g["theirs"] == "none")
    gap["mean"] = 6.04
    assert whole_image_sentence(summary) == (
        "The whole image got worse: TOD-Net's RMSE is higher by 6.0 HU against the low dose as it came."
    )


def test_of_equal_numbers_none_is_best(summary):
    for denoiser in summary["means"]["low"].values():
        denoiser["vnet_dice"]["mean"] = 0.0
    (table,) = (t for t in tables(summary, ["unet", "vnet"]) if t.name == "table2")
    best = [[cell.best for cell in cells] for _, cells in table.rows]
    assert [row[1] for row in best] == [False] * len(best)
    assert sum(row[0] for row in best) == 1


def test_the_picture_shows_the_organ_in_every_column():
    mask = torch.zeros(6, 40, 50, dtype=torch.bool)
    mask[2:4, 25:35, 5:15] = True
    columns = opening_columns(DEMO)
    assert columns == ["normal_dose", "low_dose", "mse_wgan", "tod_net"]
    images = {name: torch.where(mask, 100.0, -100.0) + 10 * i for i, name in enumerate(columns)}
    figure = opening_figure(Pictures("test-000", (3.0, 2.0, 2.0), mask, images, {}), columns)
    for i, panel in enumerate(figure.axes):
        shown = panel.images[0].get_array()
        assert (shown > 0.6).sum() == 100 and shown.shape == (15, 16)  # the whole organ, at least a third of the image
        assert shown.max() == pytest.approx((300 + 10 * i) / 400)
