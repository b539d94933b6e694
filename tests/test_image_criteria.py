"""Image criteria of other libraries, LPIPS above all: each is itself as a term, without its defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloss import Fidelity, Frozen, InputError, TaskConsistencyLoss
from tests.ecosystem import (
    LeftAsFound,
    rgb,
    warmed,
)


def kornia_criteria() -> dict[str, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]]:
    return {
        "ssim-loss": lambda k: k.losses.SSIMLoss(5),
        "ms-ssim-loss": lambda k: k.losses.MS_SSIMLoss(sigmas=[0.5, 1.0]),
        "charbonnier": lambda k: k.losses.CharbonnierLoss(reduction="mean"),
        "psnr-loss": lambda k: k.losses.PSNRLoss(1.0),
        "psnr-metric": lambda k: lambda a, b: -k.metrics.psnr(a, b, 1.0),
        "ssim-metric": lambda k: lambda a, b: 1 - k.metrics.ssim(a, b, 5).mean(),
    }


@pytest.mark.parametrize("name", kornia_criteria())
def test_a_kornia_criterion_is_itself_as_a_term(name: str) -> None:
    criterion = kornia_criteria()[name](pytest.importorskip("kornia"))
    reference = torch.rand(2, 1, 16, 16)
    x, hand = (torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    expected = criterion(hand, reference)
    expected.backward()
    value = Fidelity(criterion)(x, reference)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


def test_a_kornia_loss_of_volumes_is_itself_as_a_term() -> None:
    kornia = pytest.importorskip("kornia")
    criterion = kornia.losses.SSIM3DLoss(3)
    x, reference = torch.rand(2, 1, 8, 8, 8), torch.rand(2, 1, 8, 8, 8)
    torch.testing.assert_close(Fidelity(criterion)(x, reference), criterion(x, reference))


def test_a_metric_that_returns_a_map_is_refused_with_the_mend() -> None:
    kornia = pytest.importorskip("kornia")
    term = Fidelity(lambda a, b: kornia.metrics.ssim(a, b, 5))
    x = torch.rand(2, 1, 16, 16)
    with pytest.raises(InputError, match=r"scalar or one value per sample, got shape \(2, 1, 16, 16\); reduce it"):
        term(x, x)


# --- LPIPS -----------------------------------------------------------------------------------------------------------

lpips_warnings = (
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning"),
)


def lpips_net(net: str = "squeeze") -> nn.Module:
    lpips = pytest.importorskip("lpips")
    metric = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    for lin in metric.lins:  # the trained ones are not negative
        for weight in lin.parameters():
            weight.data.abs_()
    return metric


def colour(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size) * 2 - 1


with_lpips = pytest.mark.parametrize("net", ["squeeze", "alex"])


def lpips_test(function: Callable[..., None]) -> Callable[..., None]:
    for mark in lpips_warnings:
        function = mark(function)
    return function


@lpips_test
@with_lpips
def test_lpips_is_itself_as_a_term(net: str) -> None:
    metric = lpips_net(net)
    reference = colour(64)
    x, hand = (colour(64).requires_grad_() for _ in range(2))
    with torch.no_grad():
        hand.copy_(x)
    expected = metric.eval()(hand, reference).mean()
    expected.backward()
    metric.zero_grad(set_to_none=True)
    metric.train()
    with LeftAsFound(metric):
        value = Fidelity(metric)(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


@lpips_test
@with_lpips
def test_lpips_is_not_trained_not_saved_and_stays_in_eval_mode(net: str) -> None:
    metric = lpips_net(net)
    assert any(p.requires_grad for p in metric.parameters()), "else the test shows nothing"
    term = Fidelity(metric)
    parent = nn.ModuleDict({"loss": term}).train().requires_grad_(True)
    assert not list(parent.parameters())
    assert not parent.state_dict()
    held = term.criterion.network
    assert not any(m.training for m in held.modules())
    assert not any(p.requires_grad for p in held.parameters())
    x, reference = colour(), colour()
    assert torch.equal(term(x, reference), term(x, reference)), "dropout is active"


@lpips_test
@pytest.mark.parametrize("constant", [0.0, -1.0, 1.0])
def test_lpips_has_a_finite_gradient_and_its_own_value_where_features_vanish(constant: float) -> None:
    metric = lpips_net()
    first = next(m for m in metric.net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():  # an edge detector sees nothing in a constant image
        first.weight -= first.weight.mean((1, 2, 3), keepdim=True)
        first.weight -= first.weight.mean((2, 3), keepdim=True)
        first.bias.fill_(-1e-4)
    x = torch.full((1, 3, 32, 32), constant).requires_grad_()
    reference = colour()[:1]
    own = x.detach().clone().requires_grad_()
    own_value = metric.eval()(own, reference).mean()
    own_value.backward()
    assert not metric.net(own).relu1.any(), "else the test shows nothing"
    value = Fidelity(metric)(x, reference)
    value.backward()
    assert torch.equal(value.detach(), own_value.detach())
    assert x.grad.isfinite().all()


@lpips_test
def test_lpips_has_a_finite_gradient_where_the_squares_of_features_underflow() -> None:
    metric = lpips_net()
    first = next(m for m in metric.net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight *= 1e-30
        first.bias.zero_()
    x = colour().requires_grad_()
    Fidelity(metric)(x, colour()).backward()
    assert x.grad.isfinite().all()


@lpips_test
def test_lpips_refuses_one_channel_until_it_is_given_three() -> None:
    metric = lpips_net()
    x, reference = colour()[:, :1], colour()[:, :1]
    with pytest.raises(InputError, match=r"LPIPS needs 3 channels, got \(2, 1, 32, 32\); pass preprocess=lambda x"):
        Fidelity(metric)(x, reference)
    repeated = Fidelity(metric, preprocess=rgb)(x, reference)
    torch.testing.assert_close(repeated, metric.eval()(rgb(x), rgb(reference)).mean().detach())


@lpips_test
def test_lpips_refuses_images_from_zero_to_one_until_they_are_converted() -> None:
    metric = lpips_net()
    x, reference = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"the input spans \[.*\] but \[-1, 1\] is expected; convert it with prep"):
        Fidelity(metric)(x, reference)
    converted = Fidelity(metric, preprocess=lambda image: 2 * image - 1)(x, reference)
    torch.testing.assert_close(converted, metric.eval()(x, reference, normalize=True).mean().detach())


@lpips_test
def test_mending_lpips_leaves_the_callers_own_alone() -> None:
    metric = lpips_net()
    kind, x, reference = type(metric.net), colour(), colour()
    before = metric.eval()(x, reference)
    Fidelity(metric)
    assert type(metric.net) is kind
    assert torch.equal(metric(x, reference), before)


@lpips_test
def test_an_lpips_that_is_shared_instead_of_copied_works_and_is_checked() -> None:
    shared = Frozen(lpips_net(), copy=False)
    term, x = Fidelity(shared), colour()
    assert float(term(x, x)) == 0
    shared.network.train()
    with pytest.raises(InputError, match="was switched to training mode"):
        term(x, x)


# --- the defects of perceptual losses that this library exists to avoid ----------------------------------------------


def test_a_feature_extractor_handed_over_in_training_mode_gives_one_answer_and_stays_as_it_was() -> None:
    net = warmed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)),
        torch.rand(2, 3, 8, 8),
    )
    x, reference = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    with LeftAsFound(net):
        term = TaskConsistencyLoss(net, nn.MSELoss(), layers=["1", "4"])
        assert torch.equal(term(x, reference), term(x, reference))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_perceptual_loss_takes_any_rank_and_any_range(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    term = TaskConsistencyLoss(nn.Sequential(conv(1, 2, 3), nn.Tanh()), nn.MSELoss(), layers=["0"])
    x = -1000 + 3000 * torch.rand(1, 1, *(6,) * dims)
    assert term(x, torch.zeros_like(x)).isfinite()
    assert float(term(x, x)) == 0
