"""Balancing at x_hat: shares of gradient norm, aggregators, and one backward through the denoiser."""

import pytest
import torch
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    InputError,
    LossSum,
    TaskOrientedLoss,
    WassersteinCritic,
    gradient_maps,
)
from tests.properties import cross_entropy, image, labels, leaves_inputs_alone, segmenter


def pixels(scale: float = 1.0) -> LossSum:
    return LossSum(mse=scale * Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()), huber=Fidelity(nn.SmoothL1Loss()))


def game() -> LossSum:
    critic = WassersteinCritic(spatial_dims=2, patch_size=(6, 6), channels=(2, 2, 2))
    return LossSum(
        adv=AdversarialLoss(critic), task=TaskOrientedLoss(segmenter(), cross_entropy), mse=0.5 * Fidelity(nn.MSELoss())
    )


class Counting(torch.autograd.Function):
    backwards = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Counting.backwards += 1
        return gradient


def test_the_shares_of_the_gradient_are_the_ones_asked_for() -> None:
    shares = {"adv": 1.0, "task": 3.0, "mse": 4.0}
    loss = game()
    balancer = GradientBalancer(loss, shares=shares, decay=0.0)
    x, reference = image().requires_grad_(), image()
    y = labels(x)
    value = balancer.backward(x, reference=reference, label=y)
    maps = gradient_maps(loss, x, reference=reference, label=y)
    for name, norm in maps.norms().items():
        assert value.weights[name] * norm == pytest.approx(shares[name] / 8, rel=1e-5)
    torch.testing.assert_close(x.grad, maps.rescaled(value.weights).total)
    torch.testing.assert_close(value.total, sum(w * value.terms[n] for n, w in value.weights.items()))
    assert value.floats()["total"] == pytest.approx(float(value.total), rel=1e-5)


def test_the_moving_average_is_corrected_for_its_start() -> None:
    balancer = GradientBalancer(pixels(), shares={"mse": 1.0, "l1": 1.0, "huber": 1.0}, decay=0.9)
    reference = torch.zeros(1, 1, 4)
    for scale in (1.0, 3.0):
        balancer.backward((scale * torch.ones(1, 1, 4)).requires_grad_(), reference=reference)
    norms = {1.0: 1.0, 3.0: 3.0}  # of mse at these images: 2 x / 4 in 4 places
    expected = (0.1 * norms[3.0] + 0.9 * 0.1 * norms[1.0]) / (1 - 0.9**2)
    assert balancer.norms()["mse"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["shares", "aggregator"])
@pytest.mark.parametrize("n_terms", [1, 2, 3])
def test_exactly_one_backward_through_the_denoiser(n_terms, kind) -> None:
    terms = dict(list(pixels().terms.items())[:n_terms])
    loss = LossSum(**terms)
    options = {"shares": dict.fromkeys(terms, 1.0)} if kind == "shares" else {"aggregator": lambda rows: rows.sum(0)}
    denoiser = nn.Conv2d(1, 1, 1)
    Counting.backwards = 0
    GradientBalancer(loss, **options).backward(Counting.apply(denoiser(image())), reference=image())
    assert Counting.backwards == 1 and denoiser.weight.grad.any()


@pytest.mark.parametrize("name", ["mse", "l1", "huber"])
def test_a_loss_rescaled_by_a_thousand_changes_nothing(name) -> None:
    def gradient(scale):
        terms = {n: (scale if n == name else 1.0) * t for n, t in pixels().terms.items()}
        balancer = GradientBalancer(
            LossSum(**{n: scaled(t, scale if n == name else 1.0) for n, t in terms.items()}),
            shares={"mse": 1.0, "l1": 2.0, "huber": 0.5},
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            x = torch.rand(2, 1, 6, 6, generator=generator).requires_grad_()
            balancer.backward(x, reference=torch.rand(2, 1, 6, 6, generator=generator))
        return x.grad

    def scaled(term, factor):
        inner = next(iter(term.terms.values())).criterion
        return Fidelity(lambda a, b: factor * inner(a, b))

    torch.testing.assert_close(gradient(1000.0), gradient(1.0), rtol=1e-5, atol=1e-8)


def test_a_state_dict_round_trip_goes_on_to_the_same_numbers() -> None:
    shares = {"mse": 1.0, "l1": 1.0, "huber": 1.0}
    first = GradientBalancer(pixels(), shares=shares)
    for _ in range(3):
        first.backward(image().requires_grad_(), reference=image())
    second = GradientBalancer(pixels(), shares=shares)
    second.load_state_dict(first.state_dict())
    x, reference = image(), image()
    values = [b.backward(x.clone().requires_grad_(), reference=reference) for b in (first, second)]
    assert values[0].weights == values[1].weights
    assert first.state_dict() == second.state_dict()


def test_another_way_to_go_back_sees_the_same_gradient() -> None:
    shares = {"mse": 1.0, "l1": 1.0, "huber": 1.0}
    x, reference = image(), image()
    direct, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    GradientBalancer(pixels(), shares=shares).backward(direct, reference=reference)
    GradientBalancer(pixels(), shares=shares).backward(
        other, reference=reference, backward=lambda scalar: (8 * scalar).backward()
    )
    torch.testing.assert_close(other.grad, 8 * direct.grad)


def test_a_batch_without_labels_leaves_the_average_alone() -> None:
    loss = LossSum(task=TaskOrientedLoss(segmenter(), cross_entropy), mse=Fidelity(nn.MSELoss()))
    balancer = GradientBalancer(loss, shares={"task": 1.0, "mse": 1.0})
    x = image().requires_grad_()
    assert balancer.backward(x, reference=image(), label=[None, None]).weights["task"] == 0
    balancer.backward(x, reference=image(), label=labels(x))
    before = balancer.norms()["task"]
    value = balancer.backward(x, reference=image(), label=[None, None])
    assert balancer.norms()["task"] == before and value.terms["task"] == 0


def test_a_term_that_starts_later_needs_no_gradient_before() -> None:
    loss = LossSum(mse=Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()) * (lambda step: float(step > 0)))
    balancer = GradientBalancer(loss, shares={"mse": 1.0, "l1": 1.0}, total_norm=2.0)
    x = image().requires_grad_()
    assert balancer.backward(x, reference=image(), step=0).weights["l1"] == 0
    assert x.grad.norm() == pytest.approx(2.0, rel=1e-5)
    assert balancer.backward(x, reference=image(), step=1).weights["l1"] > 0


def test_inputs_are_left_alone_but_for_the_gradient() -> None:
    balancer = GradientBalancer(pixels(), shares={"mse": 1.0, "l1": 1.0, "huber": 1.0})
    denoiser = nn.Conv2d(1, 1, 1)
    x, reference = image(), image()
    leaves_inputs_alone(lambda: balancer.backward(denoiser(x), reference=reference), x, reference)


class TestAggregators:
    @pytest.mark.parametrize("name", ["UPGrad", "MGDA", "PCGrad", "Sum"])
    def test_of_torchjd_act_on_the_gradients_at_x_hat(self, name) -> None:
        aggregation = pytest.importorskip("torchjd.aggregation")
        if name == "UPGrad":
            pytest.importorskip("quadprog")
        loss = game()
        x, reference = image().requires_grad_(), image()
        y = labels(x)
        aggregator = getattr(aggregation, name)()
        maps = gradient_maps(loss, x, reference=reference, label=y)
        rows = torch.stack([maps.weights[n] * g.flatten() for n, g in maps.maps.items()])
        torch.manual_seed(1)
        expected = aggregator(rows)
        torch.manual_seed(1)
        value = GradientBalancer(loss, aggregator=aggregator).backward(x, reference=reference, label=y)
        torch.testing.assert_close(x.grad.flatten(), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(maps.rescaled(value.weights).total.flatten(), expected, rtol=1e-3, atol=1e-6)

    def test_that_avoid_conflict_hurt_no_term(self) -> None:
        aggregation = pytest.importorskip("torchjd.aggregation")
        pytest.importorskip("quadprog")
        left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.5]]])
        loss = LossSum(a=Fidelity(lambda x, _: (x * left).sum()), b=Fidelity(lambda x, _: (x * right).sum()))
        x = torch.zeros(1, 1, 2, requires_grad=True)
        GradientBalancer(loss, aggregator=aggregation.UPGrad()).backward(x, reference=torch.zeros(1, 1, 2))
        assert float((x.grad * left).sum()) >= -1e-6 and float((x.grad * right).sum()) >= -1e-6


class TestBadInput:
    def test_one_of_shares_and_aggregator(self) -> None:
        for options in ({}, {"shares": {"mse": 1.0}, "aggregator": sum}):
            with pytest.raises(ValueError, match=r"give either shares=\{...\} or aggregator=..., not both"):
                GradientBalancer(pixels(), **options)

    def test_a_share_for_no_term(self) -> None:
        with pytest.raises(InputError, match="gradient_balancer: there is no term 'mes'; did you mean 'mse'?"):
            GradientBalancer(pixels(), shares={"mes": 1.0})

    def test_a_term_without_a_share(self) -> None:
        with pytest.raises(InputError, match=r"term 'l1' has no share; add it to shares=\{...\}"):
            GradientBalancer(pixels(), shares={"mse": 1.0}).backward(image().requires_grad_(), reference=image())

    @pytest.mark.parametrize("share", [0.0, -1.0, float("inf")])
    def test_a_share_that_is_not_positive(self, share) -> None:
        with pytest.raises(
            ValueError, match="the share of 'mse' must be positive, got .* leave a term out with weight 0"
        ):
            GradientBalancer(pixels(), shares={"mse": share})

    def test_an_x_hat_without_a_graph(self) -> None:
        balancer = GradientBalancer(pixels(), shares={"mse": 1.0, "l1": 1.0, "huber": 1.0})
        with pytest.raises(InputError, match="x_hat carries no graph; pass the denoiser's output, not detached"):
            balancer.backward(image(), reference=image())

    def test_a_gradient_that_is_not_finite_is_named(self) -> None:
        loss = LossSum(mse=Fidelity(nn.MSELoss()), root=Fidelity(lambda x, y: (x - x).abs().sqrt().sum()))
        balancer = GradientBalancer(loss, shares={"mse": 1.0, "root": 1.0})
        with pytest.raises(FloatingPointError, match="root: the loss is 0.0 and its gradient norm at x_hat is nan"):
            balancer.backward(image().requires_grad_(), reference=image())

    @pytest.mark.parametrize("decay", [-0.1, 1.0])
    def test_the_decay(self, decay) -> None:
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
            GradientBalancer(pixels(), shares={"mse": 1.0}, decay=decay)

    def test_a_term_is_no_sum(self) -> None:
        with pytest.raises(TypeError, match=r"expected a LossSum, got Fidelity; LossSum\(name=term\)"):
            GradientBalancer(Fidelity(nn.MSELoss()), shares={"fidelity": 1.0})

    def test_averages_of_another_sum(self) -> None:
        balancer = GradientBalancer(pixels(), shares={"mse": 1.0})
        with pytest.raises(InputError, match="there is no term 'task'"):
            balancer.load_state_dict({"averages": {"task": [1.0, 1]}})
