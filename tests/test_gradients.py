"""The maps are Eq. 4-7, they add up to the total's gradient, and their numbers are right."""

import pytest
import torch
from torch import nn

from taskloss import (
    Fidelity,
    GradientBalancer,
    GradientMaps,
    InputError,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    gradient_maps,
)
from tests.properties import by_hand, cross_entropy, image, labels, leaves_inputs_alone, segmenter, soft_dice


def four_losses(net: nn.Module, spatial_dims: int) -> LossSum:
    """The paper's four losses with its own factors (Eq. 3 and 5-7), summed rather than averaged."""
    half = nn.MSELoss(reduction="sum")
    return LossSum(
        mse=Fidelity(lambda a, b: 0.5 * half(a, b)),
        l1=2.0 * Fidelity(nn.L1Loss(reduction="sum")),
        perceptual=TaskConsistencyLoss(net, lambda a, b: 0.5 * half(a, b), layers=["0"]),
        task=TaskOrientedLoss(net, soft_dice),
    )


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_four_maps_of_the_paper_are_its_equations(spatial_dims) -> None:
    net = segmenter(spatial_dims)
    x, reference = image(spatial_dims), image(spatial_dims)
    y = labels(x)
    maps = gradient_maps(four_losses(net, spatial_dims), x, reference=reference, label=y).maps
    torch.testing.assert_close(maps["mse"], x - reference)  # Eq. 5
    torch.testing.assert_close(maps["l1"], torch.sign(x - reference))  # Eq. 6
    difference = net[0](x) - net[0](reference)
    transposed = torch.nn.functional.conv_transpose2d if spatial_dims == 2 else torch.nn.functional.conv_transpose3d
    torch.testing.assert_close(maps["perceptual"], transposed(difference, net[0].weight, padding=1))  # Eq. 7
    torch.testing.assert_close(maps["task"], by_hand(net, soft_dice, x, y)[1])  # Eq. 4


def test_the_maps_add_up_to_the_gradient_of_the_total() -> None:
    loss = four_losses(segmenter(), 2) * 0.3
    x, reference = image(), image()
    y = labels(x)
    maps = gradient_maps(loss, x, reference=reference, label=y)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, reference=reference, label=y), x)
    torch.testing.assert_close(maps.total, gradient)


def test_norms_and_cosines_by_hand() -> None:
    maps = GradientMaps(
        {"a": torch.tensor([[[3.0, 0.0]]]), "b": torch.tensor([[[0.0, 2.0]]]), "c": torch.tensor([[[-1.0, 0.0]]])},
        {"a": 1.0, "b": 1.0, "c": 1.0},
        torch.zeros(1, 1, 2),
    )
    assert maps.norms() == {"a": 3.0, "b": 2.0, "c": 1.0}
    assert maps.cosines()["a"] == {"a": 1.0, "b": 0.0, "c": -1.0}


@pytest.mark.parametrize("mask", [lambda m: m, lambda m: m[:, None], lambda m: m.bool()], ids=["NHW", "N1HW", "bool"])
def test_focus_is_the_energy_inside_over_the_area_inside(mask) -> None:
    gradient = torch.zeros(1, 1, 2, 4)
    gradient[0, 0, 0] = torch.tensor([3.0, 0.0, 0.0, -1.0])
    roi = torch.zeros(1, 2, 4)
    roi[0, 0, :2] = 1
    focus = GradientMaps({"a": gradient}, {"a": 1.0}, torch.zeros(1, 1, 2, 4)).focus(mask(roi))["a"]
    assert focus.share == pytest.approx(0.9)
    assert focus.ratio == pytest.approx(0.9 / 0.25)


def test_a_gradient_that_ignores_the_region_has_ratio_one() -> None:
    x, roi = torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 8)
    roi[:, 2:5, 1:7] = 1
    focus = gradient_maps(Fidelity(nn.MSELoss()), x + 1, reference=x).focus(roi)
    assert focus["fidelity"].ratio == pytest.approx(1.0)


def test_the_task_gradient_keeps_to_where_the_task_looks() -> None:
    class LooksLeft(nn.Module):
        def forward(self, x):
            left = torch.zeros_like(x)
            left[..., :4] = x[..., :4]
            return left

    x, reference = image(size=8), image(size=8)
    roi = torch.zeros(2, 8, 8)
    roi[..., :4] = 1
    loss = LossSum(task=TaskOrientedLoss(LooksLeft(), nn.MSELoss()), mse=Fidelity(nn.MSELoss()))
    focus = gradient_maps(loss, x, reference=reference, label=reference).focus(roi)
    assert focus["task"].share == 1.0 and focus["task"].ratio == pytest.approx(2.0)
    assert 0 < focus["mse"].share < 1


def test_nothing_of_the_callers_is_touched() -> None:
    net = segmenter()
    loss = LossSum(task=TaskOrientedLoss(net, cross_entropy), mse=0.5 * Fidelity(nn.MSELoss()))
    denoiser = nn.Conv2d(1, 1, 1)
    x_hat, reference = denoiser(image()), image()
    y = labels(x_hat)
    leaves_inputs_alone(lambda: gradient_maps(loss, x_hat, reference=reference, label=y), reference, y)
    assert denoiser.weight.grad is None and x_hat.requires_grad
    with torch.no_grad():
        assert gradient_maps(loss, x_hat, reference=reference, label=y).maps["task"].any()


def test_a_zero_weight_has_no_map_and_a_schedule_has_a_step() -> None:
    loss = LossSum(mse=Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()) * (lambda step: float(step)))
    x, reference = image(), image()
    assert list(gradient_maps(loss, x, reference=reference, step=0).maps) == ["mse"]
    maps = gradient_maps(loss, x, reference=reference, step=3)
    assert maps.weights == {"mse": 1.0, "l1": 3.0}
    assert maps.rescaled({"mse": 0.0, "l1": 0.0}).total.abs().max() == 0


def test_volumes_are_written_one_nifti_per_term(tmp_path) -> None:
    nibabel = pytest.importorskip("nibabel")
    x, reference = image(3), image(3)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])).numpy()
    maps = gradient_maps(0.5 * Fidelity(nn.MSELoss()), x, reference=reference)
    (path,) = maps.to_nifti(tmp_path / "maps.nii.gz", affine, sample=1)
    assert path.name == "maps_fidelity.nii.gz" and [p.name for p in tmp_path.iterdir()] == [path.name]
    volume = nibabel.load(path)
    torch.testing.assert_close(torch.from_numpy(volume.get_fdata()).float(), maps.maps["fidelity"][1, 0])
    assert (volume.affine == affine).all()


class TestHalfPrecision:
    """A mean over a million pixels has gradients below what float16 can hold."""

    def setup_method(self) -> None:
        torch.manual_seed(0)
        self.net = segmenter()
        self.x = image(size=300).half().float()
        self.reference, self.y = image(size=300), labels(self.x)

    def loss(self) -> LossSum:
        return LossSum(
            mse=Fidelity(nn.MSELoss()),
            task=TaskOrientedLoss(self.net, cross_entropy),
            consistency=TaskConsistencyLoss(self.net, nn.MSELoss()),
        )

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("how", ["autocast", "cast"])
    def test_norms_are_those_of_float32(self, half, how) -> None:
        expected = gradient_maps(self.loss(), self.x, reference=self.reference, label=self.y)
        x = self.x.to(half)
        targets = {"reference": self.reference.to(half), "label": self.y}
        if how == "autocast":
            with torch.autocast("cpu", half):
                maps = gradient_maps(self.loss(), x, **targets)
        else:
            maps = gradient_maps(self.loss().to(half), x, **targets)
        assert maps.maps["mse"].dtype == torch.float32
        for name, norm in expected.norms().items():
            assert maps.norms()[name] == pytest.approx(norm, rel=0.05), name
            cosine = torch.cosine_similarity(maps.maps[name].flatten(), expected.maps[name].flatten(), 0)
            assert cosine > 0.98, name

    def test_a_gradient_that_float16_cannot_hold_inside_the_network_is_scaled(self) -> None:
        loss = TaskOrientedLoss(self.net, lambda p, y: 0.01 * cross_entropy(p, y))
        expected = gradient_maps(loss, self.x, label=self.y).norms()
        with torch.autocast("cpu", torch.float16):
            norms = gradient_maps(loss, self.x.half(), label=self.y).norms()
        assert norms == pytest.approx(expected, rel=0.05)

    def test_a_scaled_gradient_that_overflows_is_taken_again(self) -> None:
        loss = Fidelity(nn.MSELoss(reduction="sum"), preprocess=lambda t: t.half() * 10)
        maps = gradient_maps(loss, self.x.half(), reference=self.reference)
        expected = 200 * (self.x - self.reference)
        assert torch.isfinite(maps.maps["fidelity"]).all()
        assert torch.cosine_similarity(maps.maps["fidelity"].flatten(), expected.flatten(), 0) > 0.99

    def test_the_balancer_drops_no_term(self) -> None:
        shares = {"mse": 1.0, "task": 1.0, "consistency": 1.0}
        weights = {}
        for dtype in (torch.float32, torch.float16):
            balancer = GradientBalancer(self.loss().to(dtype), shares=shares)
            x = self.x.to(dtype, copy=True).requires_grad_()
            weights[dtype] = balancer.backward(x, reference=self.reference.to(dtype), label=self.y).weights
            assert x.grad.dtype == dtype and torch.isfinite(x.grad).all()
        assert weights[torch.float16] == pytest.approx(weights[torch.float32], rel=0.05)


def test_looking_and_validating_take_no_turn() -> None:
    loss = LossSum(task=TaskOrientedLoss([segmenter(), segmenter(), segmenter()], cross_entropy, ensemble="turns"))
    x = image()
    y = labels(x)
    turns = loss.terms["task"].turns
    gradient_maps(loss, x, label=y)
    assert turns.turn == 0
    with torch.no_grad():
        loss(x, label=y)
    loss.eval()
    loss(x, label=y)
    assert turns.turn == 0
    loss.train()
    GradientBalancer(loss, shares={"task": 1.0}).backward(x.requires_grad_(), label=y)
    loss(x, label=y)
    assert turns.turn == 2


class TestBadInput:
    def setup_method(self) -> None:
        self.maps = gradient_maps(Fidelity(nn.MSELoss()), image(), reference=image())

    def test_a_missing_target(self) -> None:
        with pytest.raises(InputError, match=r"fidelity: needs a reference, but reference is None"):
            gradient_maps(Fidelity(nn.MSELoss()), image())

    def test_inference_mode(self) -> None:
        with (
            torch.inference_mode(),
            pytest.raises(InputError, match=r"gradients need autograd, .* use torch.no_grad\(\)"),
        ):
            gradient_maps(Fidelity(nn.MSELoss()), image(), reference=image())

    def test_a_mask_of_another_shape(self) -> None:
        with pytest.raises(InputError, match=r"focus: roi \(2, 5, 5\) does not fit x_hat \(2, 1, 6, 6\)"):
            self.maps.focus(torch.ones(2, 5, 5))

    def test_an_empty_mask(self) -> None:
        with pytest.raises(InputError, match="focus: roi is empty; there is nothing to focus on"):
            self.maps.focus(torch.zeros(2, 6, 6))

    def test_images_are_no_nifti_volumes(self, tmp_path) -> None:
        with pytest.raises(InputError, match=r"to_nifti: needs volumes \(N, C, D, H, W\), got \(2, 1, 6, 6\)"):
            self.maps.to_nifti(tmp_path / "maps.nii.gz", torch.eye(4).numpy())
