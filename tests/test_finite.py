"""What is not finite is named before it reaches a weight, with one sentence, by every loss."""

import copy

import pytest
import torch
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    GradientPenalty,
    InputError,
    LossSum,
    WassersteinCritic,
    gradient_maps,
)
from tests.properties import image

NAN = float("nan")


def root_of_squares(x, y):
    """Zero where x equals y, with a gradient of 0 / 0."""
    return (x - y).square().sum((1, 2, 3)).sqrt()


def same_image_loss(**more) -> LossSum:
    return LossSum(mse=Fidelity(nn.MSELoss()), root=Fidelity(root_of_squares), **more)


def identity_denoiser() -> nn.Conv2d:
    net = nn.Conv2d(1, 1, 1)
    nn.init.ones_(net.weight), nn.init.zeros_(net.bias)
    return net


BACKWARDS = {
    "call": lambda loss, x_hat, y: loss(x_hat, reference=y).backward(),
    "breakdown": lambda loss, x_hat, y: loss.breakdown(x_hat, reference=y).total.backward(),
    "autograd.grad": lambda loss, x_hat, y: torch.autograd.grad(loss(x_hat, reference=y), x_hat),
    "accumulated": lambda loss, x_hat, y: (loss(x_hat, reference=y) / 8).backward(),
    "term": lambda loss, x_hat, y: loss.breakdown(x_hat, reference=y).terms["root"].backward(),
    "with another loss": lambda loss, x_hat, y: (loss(x_hat, reference=y) + x_hat.mean()).backward(),
    "balancer": lambda loss, x_hat, y: GradientBalancer(loss, shares={"mse": 1, "root": 1}).backward(
        x_hat, reference=y
    ),
}


@pytest.mark.parametrize("go_back", BACKWARDS.values(), ids=BACKWARDS)
def test_a_gradient_of_nan_behind_a_finite_value_names_its_term_before_a_weight_sees_it(go_back) -> None:
    denoiser, x = identity_denoiser(), image()
    with pytest.raises(
        FloatingPointError,
        match=r"^root: the loss is 0.0 and its gradient norm at x_hat is nan while x_hat is finite; look at this term",
    ):
        go_back(same_image_loss(), denoiser(x), x)
    assert denoiser.weight.grad is None


def test_another_losss_gradient_is_not_blamed_on_the_sum() -> None:
    x_hat = image().requires_grad_()
    total = LossSum(mse=Fidelity(nn.MSELoss()))(x_hat, reference=image()) + root_of_squares(x_hat, x_hat).sum()
    total.backward()
    assert x_hat.grad.isnan().any()


def test_the_overflow_of_a_scaled_loss_is_left_to_the_scaler() -> None:
    x_hat, y = image().requires_grad_(), image()
    loss = LossSum(big=1e36 * Fidelity(nn.MSELoss()))
    (65536 * loss(x_hat, reference=y)).backward()
    assert not x_hat.grad.isfinite().all()
    with pytest.raises(FloatingPointError, match="^root: the loss is 0.0"):
        (64 * same_image_loss()(x_hat, reference=x_hat.detach())).backward()


def test_the_guard_changes_neither_value_nor_gradient_and_can_be_turned_off() -> None:
    x_hat, y = image().requires_grad_(), image()
    loss = LossSum(mse=Fidelity(nn.MSELoss()), l1=0.5 * Fidelity(nn.L1Loss()))
    (guarded,) = torch.autograd.grad(loss(x_hat, reference=y), x_hat)
    loss.check_finite = False
    (free,) = torch.autograd.grad(loss(x_hat, reference=y), x_hat)
    assert torch.equal(guarded, free)
    loss = same_image_loss()
    loss.check_finite = False
    loss(x_hat, reference=x_hat.detach()).backward()
    assert x_hat.grad.isnan().any()


def test_a_reference_that_is_not_finite_is_blamed_itself() -> None:
    x_hat, y = image().requires_grad_(), torch.full((2, 1, 6, 6), NAN)
    sentence = r"the loss is nan.* while the reference is not finite; look at the data$"
    with pytest.raises(FloatingPointError, match="^mse: " + sentence):
        LossSum(mse=Fidelity(nn.MSELoss()))(x_hat, reference=y)
    with pytest.raises(FloatingPointError, match="^mse: " + sentence):
        GradientBalancer(LossSum(mse=Fidelity(nn.MSELoss())), shares={"mse": 1}).backward(x_hat * 1, reference=y)


# --- the critic ------------------------------------------------------------------------------------------------------


def normed_critic(**kwargs) -> WassersteinCritic:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LeakyReLU(), nn.Flatten(), nn.Linear(32, 1))
    return WassersteinCritic(network=network, **kwargs)


def plain_critic(**kwargs) -> WassersteinCritic:
    return WassersteinCritic(network=nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), **kwargs)


BATCHES = {
    "x_hat": (torch.full((2, 1, 6, 6), NAN), image(), "fake: .*x_hat is not finite; the denoiser diverged before it"),
    "reference": (image(), torch.full((2, 1, 6, 6), NAN), "real: .*the reference is not finite; look at the data"),
    "infinite": (image() / 0, image(), "fake.*x_hat is not finite; the denoiser diverged before it"),
}


@pytest.mark.parametrize(("x_hat", "reference", "sentence"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("build", [normed_critic, plain_critic])
def test_a_bad_batch_leaves_the_critic_as_it_was_and_is_named(build, x_hat, reference, sentence) -> None:
    critic = build()
    optimizer = torch.optim.Adam(critic.parameters())
    critic.step(optimizer, image(), image())
    state = copy.deepcopy(critic.state_dict())
    with pytest.raises(FloatingPointError, match=f"^wasserstein_critic/{sentence}$"):
        critic.step(optimizer, x_hat, reference)
    assert all(torch.equal(new, state[name]) for name, new in critic.state_dict().items()), "poisoned"
    assert all(p.grad is None for p in critic.parameters())
    critic.step(optimizer, image(), image())


def test_a_critics_gradient_of_nan_behind_a_finite_value_is_caught() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return (self.w * x).square().sum((1, 2, 3)).sqrt()

    critic = WassersteinCritic(network=Flat())
    with pytest.raises(FloatingPointError, match="total: the loss is 0.0 and its gradient norm at the weights is nan"):
        critic.step(torch.optim.SGD(critic.parameters(), lr=0.1), image(), image())
    assert critic.network.w == 0


def test_weights_that_are_poisoned_already_are_blamed() -> None:
    critic = plain_critic()
    nn.init.constant_(critic.network[1].weight, NAN)
    for act in (critic.breakdown, critic.loss, lambda a, b: critic.step(torch.optim.SGD([torch.zeros(1)]), a, b)):
        with pytest.raises(FloatingPointError, match="^wasserstein_critic/fake, .*weights are not finite already"):
            act(image(), image())


def test_one_transfer_per_critic_step_and_none_without_the_check(monkeypatch) -> None:
    critic = plain_critic(constraint=GradientPenalty())
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    transfers = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, name=name: transfers.append(name) or original(self)
        )
    value = critic.step(optimizer, image(), image())
    numbers = value.floats()
    assert transfers == ["tolist"] and list(numbers) == ["fake", "real", "penalty", "total"]
    critic.check_finite = False
    critic.step(optimizer, image(), image())
    assert transfers == ["tolist"]


# --- torch.func ------------------------------------------------------------------------------------------------------


def test_per_sample_gradients_by_vmap_are_those_of_each_sample_alone() -> None:
    x, y = image(n=3), image(n=3)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 1)).eval()
    loss = LossSum(mse=Fidelity(nn.MSELoss(), expects=(0, 1)), adv=AdversarialLoss(WassersteinCritic(network=network)))
    each = torch.func.vmap(torch.func.grad(lambda a, b: loss(a[None], reference=b[None])))(x, y)
    for i in range(3):
        maps = gradient_maps(loss, x[i : i + 1], reference=y[i : i + 1])
        torch.testing.assert_close(each[i : i + 1], maps.total)


def test_vmap_through_a_batch_norm_that_is_training_is_explained() -> None:
    loss = LossSum(adv=AdversarialLoss(normed_critic()))
    with pytest.raises(InputError, match=r"adv: a batch norm .* no per-sample gradient; call critic.eval\(\)"):
        torch.func.vmap(torch.func.grad(lambda a: loss(a[None])))(image())
