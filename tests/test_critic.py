"""The Wasserstein game: signs, constraints, and that neither side touches the other."""

import copy

import pytest
import torch
from torch import nn

from taskloss import AdversarialLoss, GradientPenalty, InputError, LossSum, WassersteinCritic, WeightClipping
from tests.properties import image, leaves_inputs_alone

SIZES = {1: (16,), 2: (8, 12), 3: (8, 16, 5)}


def small_critic(spatial_dims: int = 2, size: int = 8, **kwargs) -> WassersteinCritic:
    return WassersteinCritic(spatial_dims=spatial_dims, patch_size=(size,) * spatial_dims, channels=(2, 3, 4), **kwargs)


def linear_critic(norm: float, n: int) -> nn.Sequential:
    """D(x) = w.x with |w| = norm."""
    linear = nn.Linear(n, 1, bias=False)
    with torch.no_grad():
        linear.weight.mul_(norm / linear.weight.norm())
    return nn.Sequential(nn.Flatten(), linear)


@pytest.mark.parametrize("spatial_dims", SIZES)
def test_the_papers_network(spatial_dims) -> None:
    critic = WassersteinCritic(in_channels=2, spatial_dims=spatial_dims, patch_size=SIZES[spatial_dims])
    convs = [m for m in critic.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    assert [c.out_channels for c in convs] == [32, 64, 128]
    assert {c.kernel_size for c in convs} == {(3,) * spatial_dims}
    assert critic(torch.rand(3, 2, *SIZES[spatial_dims])).shape == (3,)


def test_its_published_size() -> None:
    critic = WassersteinCritic(spatial_dims=3, patch_size=(32, 256, 256))
    assert sum(p.numel() for p in critic.parameters()) == 802_305


def test_the_loss_is_eq_1_with_our_sign() -> None:
    critic = small_critic()
    fake, real = image(size=8), image(size=8)
    torch.testing.assert_close(critic.loss(fake, real), critic(fake).mean() - critic(real).mean())


def test_the_critic_gains_when_real_scores_rise_and_the_denoiser_when_fake_scores_rise() -> None:
    critic = WassersteinCritic(network=linear_critic(1.0, 64))
    fake, real = image(size=8), image(size=8)
    up = critic.network[1].weight.detach().view(1, 1, 8, 8)
    assert critic.loss(fake, real + up) < critic.loss(fake, real)
    assert AdversarialLoss(critic)(fake + up) < AdversarialLoss(critic)(fake)
    torch.testing.assert_close(critic.distance(fake, real), -critic.loss(fake, real).detach())


def test_a_trained_critic_tells_real_from_fake() -> None:
    critic = small_critic()
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=5e-3)
    fakes, reals = image(n=16, size=8) * 0.5, image(n=16, size=8)
    before = critic.distance(fakes, reals)
    for _ in range(30):
        critic.step(optimizer, fakes, reals)
    assert critic.distance(fakes, reals) > before + 1e-5


@pytest.mark.parametrize("spatial_dims", SIZES)
@pytest.mark.parametrize(("norm", "penalty"), [(1.0, 0.0), (3.0, 4.0), (0.0, 1.0)])
def test_the_penalty_of_a_linear_critic_is_its_closed_form(spatial_dims, norm, penalty) -> None:
    x = image(spatial_dims, n=3, size=4)
    critic = WassersteinCritic(network=linear_critic(norm, x[0].numel()), constraint=GradientPenalty(10.0))
    value = critic.breakdown(x, image(spatial_dims, n=3, size=4))
    numbers = value.floats()
    assert numbers["penalty"] == pytest.approx(penalty, abs=1e-5)
    assert numbers["total"] == pytest.approx(numbers["fake"] - numbers["real"] + 10 * penalty, abs=1e-4)
    value.total.backward()
    assert torch.isfinite(critic.network[1].weight.grad).all()


def test_the_penalty_does_not_depend_on_the_batch_size() -> None:
    critic = WassersteinCritic(
        network=nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)),
        constraint=GradientPenalty(),
    )
    one, other = image(n=1), image(n=1)
    alone = [critic.breakdown(one, other).terms["penalty"] for _ in range(200)]
    many = critic.breakdown(one.expand(200, -1, -1, -1), other.expand(200, -1, -1, -1)).terms["penalty"]
    torch.testing.assert_close(torch.stack(alone).mean(), many, rtol=0.02, atol=1e-4)


def test_the_penaltys_draws_come_from_its_generator() -> None:
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 1))
        torch.nn.init.constant_(network[1].weight, 0.1), torch.nn.init.constant_(network[3].weight, 0.3)
        return GradientPenalty(generator=generator).penalty(network, x, reference)

    x, reference = image(), image()
    rng = torch.get_rng_state()
    first = draw(1)
    torch.set_rng_state(rng)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2))


def test_the_penalty_can_be_watched_in_inference_mode() -> None:
    critic = WassersteinCritic(network=linear_critic(3.0, 36), constraint=GradientPenalty())
    with torch.inference_mode():
        assert critic.breakdown(image(), image()).floats()["penalty"] == pytest.approx(4.0, abs=1e-5)


def test_batch_norm_and_the_penalty_do_not_go_together() -> None:
    with pytest.raises(
        InputError, match=r"gradient_penalty: '1' is a BatchNorm2d, which mixes the samples of a batch; use"
    ):
        small_critic(constraint=GradientPenalty())


@pytest.mark.parametrize("skip_norm", [False, True])
def test_clipping_bounds_every_weight(skip_norm) -> None:
    critic = small_critic(constraint=WeightClipping(0.01, skip_norm=skip_norm))
    before = [parameter.detach().clone() for parameter in critic.parameters()]
    assert any((b > 0.01).any() for b in before) and any((b < -0.01).any() for b in before)
    assert any(((b != 0) & (b.abs() < 0.01)).any() for b in before), "some to be left as they are"
    critic.step(torch.optim.SGD(critic.parameters(), lr=0.0), image(size=8), image(size=8))
    norms = [m for m in critic.network if isinstance(m, nn.BatchNorm2d)]
    spared = {id(p) for m in norms for p in m.parameters()} if skip_norm else set()
    for parameter, old in zip(critic.parameters(), before, strict=True):
        assert torch.equal(parameter, old if id(parameter) in spared else old.clamp(-0.01, 0.01))
    gamma = 1.0 if skip_norm else 0.01  # the published code clamps the scales of batch norm too
    assert all(torch.allclose(m.weight, torch.tensor(gamma)) for m in norms)


def test_the_critics_step_leaves_no_gradient_in_the_denoiser() -> None:
    denoiser = nn.Conv2d(1, 1, 3, padding=1)
    critic = small_critic()
    x_hat = denoiser(image(size=8))
    value = critic.step(torch.optim.SGD(critic.parameters(), lr=0.1), x_hat, image(size=8))
    assert denoiser.weight.grad is None
    assert value.weights == {"fake": 1.0, "real": -1.0}
    torch.testing.assert_close(value.total, value.terms["fake"] - value.terms["real"])


@pytest.mark.parametrize("training", [True, False])
def test_the_denoisers_term_leaves_the_critic_as_it_was(training) -> None:
    critic = small_critic().train(training)
    critic.network[0].weight.requires_grad_(False)
    state = copy.deepcopy(critic.state_dict())
    flags = [p.requires_grad for p in critic.parameters()]
    x_hat = image(size=8).requires_grad_()
    AdversarialLoss(critic)(x_hat).backward()
    critic.distance(x_hat, image(size=8))
    assert x_hat.grad.any()
    assert all(p.grad is None for p in critic.parameters())
    assert [p.requires_grad for p in critic.parameters()] == flags
    assert all(m.training is training for m in critic.modules())
    assert all(torch.equal(v, state[k]) for k, v in critic.state_dict().items()), "batch statistics moved"


def test_the_denoisers_term_is_the_gradient_by_hand() -> None:
    critic = small_critic()
    x = image(size=8).requires_grad_()
    (expected,) = torch.autograd.grad(-copy.deepcopy(critic)(x).mean(), x)
    (gradient,) = torch.autograd.grad(AdversarialLoss(critic)(x), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradcheck_of_the_denoisers_term_in_float64(spatial_dims) -> None:
    network = linear_critic(2.0, 4**spatial_dims).append(nn.Tanh())
    adversarial = AdversarialLoss(WassersteinCritic(network=network).double())
    x = image(spatial_dims, size=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(adversarial, x)


def test_the_critic_is_not_part_of_the_loss() -> None:
    critic = small_critic()
    loss = LossSum(adv=AdversarialLoss(critic))
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    loss.eval()
    assert critic.training
    assert loss.terms["adv"].critic is critic


def test_inputs_are_left_alone() -> None:
    critic = small_critic()
    fake, real = image(size=8).requires_grad_(), image(size=8)
    leaves_inputs_alone(lambda: critic.loss(fake, real), fake, real)
    leaves_inputs_alone(lambda: critic.distance(fake, real), fake, real)
    leaves_inputs_alone(lambda: AdversarialLoss(critic)(fake), fake)


def test_another_way_to_go_back_can_be_given() -> None:
    seen = []
    critic = small_critic()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    critic.step(optimizer, image(size=8), image(size=8), backward=lambda total: seen.append(total) or total.backward())
    assert len(seen) == 1 and seen[0].dim() == 0


class TestBadInput:
    def test_another_patch_size_is_refused_and_never_folded_into_the_batch(self) -> None:
        critic = small_critic(size=8)
        with pytest.raises(
            InputError,
            match=r"wasserstein_critic: built for patches of \(8, 8\), got images \(4, 1, 4, 4\); "
            r"build it with patch_size=\(4, 4\)",
        ):
            critic(image(n=4, size=4))

    def test_a_network_that_mixes_samples_is_refused(self) -> None:
        critic = WassersteinCritic(network=nn.Sequential(nn.Flatten(0), nn.Linear(72, 1)))
        with pytest.raises(
            InputError, match=r"2 samples came in and scores of shape \(1,\) went out; the network must"
        ):
            critic(image())

    def test_one_of_patch_size_and_network(self) -> None:
        for kwargs in ({}, {"patch_size": (8, 8), "network": nn.Flatten()}):
            with pytest.raises(ValueError, match="give either patch_size, for the paper's network, or network=..."):
                WassersteinCritic(**kwargs)

    def test_a_patch_size_of_the_wrong_rank(self) -> None:
        with pytest.raises(ValueError, match=r"a number for each spatial axis, got 8; patch_size=\(8, 8\)$"):
            WassersteinCritic(spatial_dims=2, patch_size=8)
        with pytest.raises(ValueError, match=r"patch_size \(8, 8\) must have spatial_dims=3 numbers"):
            WassersteinCritic(patch_size=(8, 8))

    def test_a_patch_too_small(self) -> None:
        with pytest.raises(ValueError, match=r"patch_size \(4, 8\) is too small; give at least 5 per axis"):
            WassersteinCritic(spatial_dims=2, patch_size=(4, 8))

    def test_channels_are_three(self) -> None:
        with pytest.raises(ValueError, match=r"channels must be three numbers, got \(1, 2\)"):
            WassersteinCritic(spatial_dims=2, patch_size=(8, 8), channels=(1, 2))

    def test_images_that_differ_in_shape(self) -> None:
        with pytest.raises(InputError, match="wasserstein_critic: x_hat .* and reference .* differ in shape"):
            small_critic().loss(image(size=8), image(n=1, size=8))

    @pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
    def test_the_clip_is_positive(self, clip) -> None:
        with pytest.raises(ValueError, match="weight_clipping: clip must be positive, got"):
            WeightClipping(clip)

    def test_the_penaltys_weight_is_not_negative(self) -> None:
        with pytest.raises(ValueError, match=r"gradient_penalty: weight must not be negative, got -1.0"):
            GradientPenalty(-1.0)

    def test_the_denoisers_term_wants_a_critic(self) -> None:
        with pytest.raises(
            TypeError, match=r"expected a WassersteinCritic, got Flatten; wrap .* WassersteinCritic\(network"
        ):
            AdversarialLoss(nn.Flatten())
