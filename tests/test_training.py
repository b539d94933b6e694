"""The losses inside other people's training: accumulation, scalers, evaluation, a whole game."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    Frozen,
    GradientBalancer,
    GradientPenalty,
    LossSum,
    Term,
    WeightClipping,
    gradient_maps,
)
from tests.scenes import TERMS, every_term, small_critic, target_of, tod_net_loss, x_reference_label

# --- accumulation and scalers ----------------------------------------------------------------------------------------


def test_gradients_of_half_batches_accumulate_to_that_of_the_batch() -> None:
    low, reference, label = (t.repeat(2, *(1,) * (t.dim() - 1)) for t in x_reference_label())
    low = low + 0.1 * torch.randn_like(low)
    critic, denoiser = small_critic(), nn.Conv2d(1, 1, 3, padding=1)
    loss = LossSum(
        adv=AdversarialLoss(critic), task=TERMS["task"](), see=TERMS["consistency"](), mse=Fidelity(nn.MSELoss())
    )
    loss(denoiser(low), reference=reference, label=label).backward()
    expected = [p.grad.clone() for p in denoiser.parameters()]
    denoiser.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        value = loss(denoiser(low[part]), reference=reference[part], label=label[part])
        (value / 2).backward()
    for parameter, gradient in zip(denoiser.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_a_balancer_accumulates_like_backward(decay: float) -> None:
    low, reference, label = x_reference_label()
    loss, denoiser = tod_net_loss(small_critic()), nn.Conv2d(1, 1, 3, padding=1)
    balancer = GradientBalancer(loss, shares=dict.fromkeys(loss.weights, 1.0), decay=decay)
    balancer.backward(denoiser(low), reference=reference, label=label)
    once = [p.grad.clone() for p in denoiser.parameters()]
    balancer.backward(denoiser(low), reference=reference, label=label)
    for parameter, gradient in zip(denoiser.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)  # the same batch: the same norms, the same gradient


def scaled(scaler: torch.amp.GradScaler) -> Callable[[Tensor], None]:
    return lambda value: scaler.scale(value).backward()


@pytest.mark.parametrize("kind", ["shares", "aggregator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_balancer_through_a_grad_scaler_gives_the_direct_gradient(kind: str, dtype: torch.dtype) -> None:
    low, reference, label = x_reference_label()
    low, reference = low.to(dtype), reference.to(dtype)
    critic = small_critic().to(dtype)
    loss, denoiser = tod_net_loss(critic).to(dtype), nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    how = (
        {"shares": dict.fromkeys(loss.weights, 1.0)} if kind == "shares" else {"aggregator": lambda rows: rows.mean(0)}
    )
    direct = GradientBalancer(loss, **how).backward(denoiser(low), reference=reference, label=label)
    expected = [p.grad.clone() for p in denoiser.parameters()]
    optimizer.zero_grad()
    surrogate = GradientBalancer(loss, **how).backward(
        denoiser(low), reference=reference, label=label, backward=scaled(scaler)
    )
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(denoiser.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert surrogate.weights == direct.weights


@pytest.mark.parametrize("constraint", [WeightClipping(0.05), GradientPenalty(10.0)], ids=["clip", "penalty"])
def test_a_critic_step_through_a_scaler_that_unscales_is_the_direct_step(constraint: Any) -> None:
    x, reference, _ = x_reference_label()
    weights, through_the_scaler = [], []
    start = small_critic(constraint)
    for kind in ("direct", "scaled"):
        critic = copy.deepcopy(start)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def backward(value: Tensor, scaler: Any = scaler, optimizer: Any = optimizer) -> None:
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            through_the_scaler.append(float(value.detach()))

        torch.manual_seed(3)  # for the penalty's alpha
        critic.step(optimizer, x, reference, backward=None if kind == "direct" else backward)
        weights.append(nn.utils.parameters_to_vector(critic.parameters()))
    assert len(through_the_scaler) == 1
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], nn.utils.parameters_to_vector(start.parameters()))


def test_a_half_precision_x_hat_takes_a_balanced_gradient_in_its_own_type() -> None:
    low, reference, label = x_reference_label()
    loss, denoiser = tod_net_loss(small_critic()), nn.Conv2d(1, 1, 3, padding=1)
    balancer = GradientBalancer(loss, shares=dict.fromkeys(loss.weights, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = denoiser(low)
        value = balancer.backward(x_hat, reference=reference, label=label)
    assert x_hat.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.any() for p in denoiser.parameters())
    assert value.total.isfinite()


# --- evaluation ------------------------------------------------------------------------------------------------------

no_graph = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference-mode"])


@no_graph
@every_term
def test_a_term_is_the_same_without_a_graph_and_trains_afterwards(
    build: Callable[[], Term], mode: Callable[[], Any]
) -> None:
    term = build()
    x, reference, label = x_reference_label()
    target = target_of(term, reference, label)
    expected = term(x, *target)
    fresh = copy.deepcopy(term)
    for subject in (term, fresh):  # with and without anything remembered from training
        with mode():
            value = subject(x.clone(), *target)
        assert not value.requires_grad
        assert torch.equal(value, expected)
        leaf = x.clone().requires_grad_()
        subject(leaf, *target).backward()
        assert leaf.grad.isfinite().all()


@no_graph
def test_a_sum_is_evaluated_and_logged_without_a_graph(mode: Callable[[], Any]) -> None:
    critic = small_critic()
    loss = tod_net_loss(critic)
    x, reference, label = x_reference_label()
    expected = loss.breakdown(x, reference=reference, label=label).floats("val/")
    with mode():
        value = loss.breakdown(x, reference=reference, label=label)
        assert value.floats("val/") == expected
        assert float(critic.distance(x, reference)) == pytest.approx(
            float(critic(reference).mean() - critic(x).mean()), abs=1e-6
        )
        assert loss.terms["task"].predict(x).shape == (2, 2, 8, 8)


def test_gradient_maps_can_be_drawn_during_a_validation_without_gradients() -> None:
    loss = tod_net_loss(small_critic())
    x, reference, label = x_reference_label()
    expected = gradient_maps(loss, x, reference=reference, label=label)
    with torch.no_grad():
        maps = gradient_maps(loss, x, reference=reference, label=label)
    for name, gradient in expected.maps.items():
        assert torch.equal(maps.maps[name], gradient)


# --- a whole game ----------------------------------------------------------------------------------------------------


def test_the_documented_loop_trains_the_denoiser_and_the_critic_and_nothing_else() -> None:
    critic, denoiser = small_critic(), nn.Conv2d(1, 1, 3, padding=1)
    loss = tod_net_loss(critic)
    digests = [m.digest() for m in loss.modules() if isinstance(m, Frozen)]
    opt_d = torch.optim.RMSprop(critic.parameters(), lr=1e-2)
    opt_g = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    reference, label = torch.rand(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    low = reference + 0.3 * torch.randn_like(reference)
    before = F.mse_loss(denoiser(low), reference).item()
    start = [p.detach().clone() for p in critic.parameters()]
    for _ in range(30):
        x_hat = denoiser(low)
        critic.step(opt_d, x_hat.detach(), reference)
        value = loss.breakdown(x_hat, reference=reference, label=label)
        opt_g.zero_grad()
        value.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())
        opt_g.step()
    assert F.mse_loss(denoiser(low), reference).item() < before / 2
    assert any(not torch.equal(a, b) for a, b in zip(start, critic.parameters(), strict=True))
    assert [m.digest() for m in loss.modules() if isinstance(m, Frozen)] == digests
