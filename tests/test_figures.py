"""Fig. 2: the panels are there, centred on zero, on the scale asked for, with the numbers in the titles."""

import pytest
import torch
from torch import nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, gradient_maps, plot_gradient_maps
from tests.properties import cross_entropy, image, labels, segmenter

pytest.importorskip("matplotlib")


def maps_of(spatial_dims: int):
    loss = LossSum(
        mse=Fidelity(nn.MSELoss()),
        l1=Fidelity(nn.L1Loss()),
        task=TaskOrientedLoss(segmenter(spatial_dims), cross_entropy),
    )
    x, reference = image(spatial_dims, size=8), image(spatial_dims, size=8)
    y = labels(x)
    return gradient_maps(loss, x, reference=reference, label=y), loss.terms["task"].predict(x), y


def panels(figure):
    return [a for a in figure.axes if a.images and a.get_title()]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_two_rows_of_fig_2(spatial_dims) -> None:
    maps, prediction, y = maps_of(spatial_dims)
    figure = plot_gradient_maps(maps, prediction=prediction, roi=y, titles={"mse": "MSE"})
    titles = [p.get_title() for p in panels(figure)]
    assert titles[:4] == ["reference $x^*$", r"restored $\hat{x}$", "label", r"$T(\hat{x})$"]
    assert len(titles) == 7 and "MSE" in titles[4] and "task" in titles[6]
    share = maps.focus(y)["task"].share
    assert f"{share:.0%} in the ROI (" in titles[6]


def test_maps_are_centred_on_zero_each_or_all_on_one_scale() -> None:
    maps, _, _ = maps_of(2)
    own = [p.images[0].get_clim() for p in panels(plot_gradient_maps(maps))[3:]]
    shared = [p.images[0].get_clim() for p in panels(plot_gradient_maps(maps, scale="shared"))[3:]]
    assert all(low == -high for low, high in own + shared)
    assert len(set(own)) == 3 and len(set(shared)) == 1
    assert shared[0][1] == max(high for _, high in own)


def test_the_slice_asked_for_is_the_one_drawn() -> None:
    maps, _, y = maps_of(3)
    for axis in (0, 1, 2):
        drawn = panels(plot_gradient_maps(maps, axis=axis, index=3, sample=1))[-1].images[0].get_array()
        expected = maps.maps["task"][1, 0].select(axis, 3)
        torch.testing.assert_close(torch.as_tensor(drawn.data), expected)


def test_the_default_slice_shows_most_of_the_roi() -> None:
    maps, _, _ = maps_of(3)
    roi = torch.zeros(2, 8, 8, 8)
    roi[0, 5] = 1
    drawn = panels(plot_gradient_maps(maps, roi=roi))[-1].images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(drawn.data), maps.maps["task"][0, 0, 5])


def test_a_class_label_is_no_picture() -> None:
    maps = gradient_maps(Fidelity(nn.MSELoss()), image(), reference=image())
    maps = type(maps)(maps.maps, maps.weights, maps.x_hat, maps.reference, torch.tensor([1, 0]))
    assert "label" not in [p.get_title() for p in panels(plot_gradient_maps(maps))]


def test_it_can_be_saved(tmp_path) -> None:
    maps, prediction, _ = maps_of(2)
    plot_gradient_maps(maps, prediction=prediction).savefig(tmp_path / "fig2.png")
    assert (tmp_path / "fig2.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"axis": 3}, "plot_gradient_maps: axis must be 0, 1 or 2, got 3"),
        ({"index": 8}, "plot_gradient_maps: index 8 is outside the 8 slices of axis 0"),
        ({"scale": "log"}, "plot_gradient_maps: scale must be 'own' or 'shared', got 'log'"),
    ],
)
def test_bad_options_get_one_sentence(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        plot_gradient_maps(maps_of(3)[0], **options)


def test_signals_are_drawn_as_lines_under_each_other() -> None:
    maps, prediction, y = maps_of(1)
    roi = torch.zeros(2, 8)
    roi[1, 2:4] = roi[1, 6] = 1
    figure = plot_gradient_maps(maps, prediction=prediction, roi=roi, sample=1, titles={"mse": "MSE"}, window=(-1, 2))
    signal, classes, *gradients = figure.axes
    assert [line.get_label() for line in signal.lines] == ["reference $x^*$", r"restored $\hat{x}$"]
    torch.testing.assert_close(torch.as_tensor(signal.lines[1].get_ydata()), maps.x_hat[1, 0])
    torch.testing.assert_close(torch.as_tensor(classes.lines[0].get_ydata()), y[1].float())
    assert signal.get_ylim() == (-1, 2)
    titles = [panel.get_title() for panel in gradients]
    assert "MSE" in titles[0] and "task" in titles[2]
    assert f"{maps.focus(roi)['task'].share:.0%} in the ROI" in titles[2]
    limits = [panel.get_ylim() for panel in gradients]
    assert all(low == -high and high >= maps.maps["mse"][1].abs().max() for low, high in limits[:1])
    assert all(low == -high for low, high in limits)
    shaded = [patch for patch in gradients[0].patches if patch.get_alpha() == 0.15]
    # A rectangle, or before matplotlib 3.9 a polygon.
    edges = [patch.get_patch_transform().transform(patch.get_path().vertices)[:, 0] for patch in shaded]
    assert [(x.min(), x.max()) for x in edges] == [(1.5, 3.5), (5.5, 6.5)]


def test_signals_share_a_scale_where_asked() -> None:
    maps, _, _ = maps_of(1)
    own, shared = (
        {panel.get_ylim() for panel in plot_gradient_maps(maps, scale=scale).axes[2:]} for scale in ("own", "shared")
    )
    assert len(own) == 3 and len(shared) == 1
