"""A training's history: every number is the one that was recorded, and the picture shows it."""

import json

import pytest
import torch
from torch import nn

from taskloss import Fidelity, GradientBalancer, History, InputError, LossSum, TaskOrientedLoss, gradient_maps
from tests.properties import cross_entropy, image, labels, segmenter

pytest.importorskip("matplotlib")


def trained(steps: int = 4):
    """A history of a balanced training whose sum is nested and whose maps are taken at every other step."""
    both = TaskOrientedLoss(segmenter(), cross_entropy) + Fidelity(nn.L1Loss())
    loss = LossSum(weight=both, mse=0.5 * Fidelity(nn.MSELoss()))
    balancer = GradientBalancer(loss, shares=dict.fromkeys(loss.weights, 1.0))
    history, values, maps = History(), [], []
    for step in range(0, 10 * steps, 10):
        x = image().requires_grad_()
        targets = {"reference": image(), "label": labels(x)}
        values.append(balancer.backward(x, **targets))
        maps.append(gradient_maps(loss, x, **targets))
        history.record(values[-1], step=step, gradients=maps[-1] if step % 20 else balancer)
    return history, values, maps, balancer


def test_a_row_is_what_the_value_and_the_gradients_say() -> None:
    history, values, maps, _ = trained()
    row = history.rows()[3]
    assert row["step"] == 30
    assert row["loss/weight/task_oriented_loss"] == values[3].terms["weight/task_oriented_loss"].item()
    assert row["loss/total"] == pytest.approx(values[3].total.item())
    assert row["weight/mse"] == values[3].weights["mse"]
    assert row["norm/mse"] == maps[3].norms()["mse"]
    assert row["cosine/weight/fidelity,mse"] == maps[3].cosines()["weight/fidelity"]["mse"]
    assert not any(key.startswith("cosine/") for key in history.rows()[2])


def test_numbers_alone_are_kept() -> None:
    history, *_ = trained(2)
    assert json.loads(json.dumps(history.state_dict())) == history.state_dict()


def test_the_picture_shows_every_curve_over_its_steps() -> None:
    history, values, maps, _ = trained()
    panels = {panel.get_title(): panel for panel in history.plot().axes}
    assert list(panels)[:2] == ["terms, unweighted", "weights"] and len(panels) == 4
    rows = [panel.get_subplotspec().rowspan.start for panel in panels.values()]
    assert rows == [0, 0, 1, 1]  # two in a row, so that they can be read on a page
    curves = {line.get_label(): line for line in panels["terms, unweighted"].lines}
    assert list(curves) == ["weight/task_oriented_loss", "weight/fidelity", "mse", "total"]
    assert list(curves["mse"].get_xdata()) == [0, 10, 20, 30]
    assert list(curves["mse"].get_ydata()) == [value.terms["mse"].item() for value in values]
    cosines = panels[r"cosines at $\hat{x}$"]
    assert list(cosines.lines[0].get_xdata()) == [10, 30] and cosines.get_ylim() == (-1.05, 1.05)


def test_a_scale_is_logarithmic_only_where_every_number_is_positive() -> None:
    history = History()
    loss = LossSum(mse=(lambda step: float(step)) * Fidelity(nn.MSELoss()))
    for step in range(3):
        history.record(loss.breakdown(torch.ones(1, 1, 4), reference=torch.zeros(1, 1, 4), step=step))
    terms, weights = history.plot().axes
    assert terms.get_yscale() == "linear" and weights.get_yscale() == "linear"  # the total was zero at the start
    assert trained(2)[0].plot().axes[0].get_yscale() == "log"


def test_smoothing_is_a_running_mean_over_the_raw_curve() -> None:
    history, values, *_ = trained()
    raw, smooth = history.plot(smooth=2).axes[0].lines[4:6]
    mse = [value.terms["mse"].item() for value in values]
    assert list(raw.get_ydata()) == mse
    assert list(smooth.get_ydata()) == pytest.approx(
        [mse[0], *((a + b) / 2 for a, b in zip(mse, mse[1:], strict=False))]
    )


def test_it_goes_on_from_a_checkpoint() -> None:
    history, values, *_ = trained(2)
    resumed = History()
    resumed.load_state_dict(history.state_dict())
    assert resumed.record(values[0])["step"] == 11
    assert resumed.rows()[:2] == history.rows() and len(history.rows()) == 2


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda h, v: History().plot(), r"history: nothing was recorded; call history.record\(value\) in the loop"),
        (lambda h, v: h.plot(smooth=0), "history: smooth must be at least 1, got 0"),
        (lambda h, v: h.record(v, step=10), "history: step 10 comes after step 10; record steps in order"),
    ],
)
def test_bad_input_gets_one_sentence(act, sentence) -> None:
    history, values, *_ = trained(2)
    with pytest.raises(InputError, match=sentence):
        act(history, values[0])
