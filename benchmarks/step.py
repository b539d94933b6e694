"""One training step with ``LossSum(adv, task, mse)``: beside the same lines by hand, and beside the published way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Live, Options, Target, agree, compare
from examples.tod_net_ct.networks import Denoiser
from taskloss import AdversarialLoss, Fidelity, LossSum, TaskOrientedLoss, WassersteinCritic

SIZE, QUICK_SIZE = (16, 64, 64), (16, 16, 16)
BATCH = 2
WIDTH = 2  # of the denoiser's first layer; the paper's is 32, and its U-Net's first layer has twice that
CLIP = 0.01  # the paper's


@dataclass
class Scene:
    """What both sides are given: networks and one batch."""

    denoiser: nn.Module
    critic: WassersteinCritic
    segmenter: nn.Module
    low: Tensor
    reference: Tensor
    label: Tensor


def scene(options: Options) -> Scene:
    """The paper's denoiser and critic and a U-Net, with random weights: time does not depend on them.

    The U-Net is MONAI's with two convolutions a level, from full resolution on as the authors' is, and its width stands
    to the denoiser's as theirs does: how much a wasteful step wastes depends on that.
    """
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    size = QUICK_SIZE if options.quick else SIZE
    to = {"device": options.device, "dtype": options.dtype}
    reference = torch.rand(BATCH, 1, *size, **to)
    return Scene(
        Denoiser(WIDTH).to(**to),
        WassersteinCritic(patch_size=size, channels=(WIDTH, 2 * WIDTH, 4 * WIDTH)).to(**to),
        BasicUNet(3, 1, 2, features=[2 * WIDTH * n for n in (1, 2, 4, 8, 8, 1)], norm="batch").eval().to(**to),
        (reference + 0.1 * torch.randn_like(reference)).clamp(0, 1),
        reference,
        (reference[:, 0] > 0.5).long(),
    )


def run(options: Options) -> list[Case]:
    """Three cases: the generator's step, its loss alone (where nothing dilutes the overhead), and the whole step."""
    return [by_hand(options), by_hand(options, alone=True), published(options)]


def by_hand(options: Options, alone: bool = False) -> Case:
    """The generator's step, or only its loss and the gradient at x_hat, as an expert writes it."""
    what = "loss and gradient at x_hat" if alone else "generator step"
    s = scene(options)
    case = Case(f"{what}, {' x '.join(map(str, s.low.shape))}")
    loss = _loss(s)
    frozen = copy.deepcopy(s.segmenter).requires_grad_(False)
    judge = copy.deepcopy(s.critic.network).requires_grad_(False)

    def ours(x_hat: Tensor) -> Tensor:
        return loss(x_hat, reference=s.reference, label=s.label)

    def theirs(x_hat: Tensor) -> Tensor:
        adv = -judge(x_hat).mean()  # in the sum's order: memory at the peak depends on it
        task = F.cross_entropy(frozen(x_hat), s.label)
        return adv + task + 0.5 * F.mse_loss(x_hat, s.reference)

    def side(compute: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def step() -> tuple[Tensor, Tensor]:
            if alone:
                x_hat = s.low.clone().requires_grad_()
                value = compute(x_hat)
                return value.detach(), torch.autograd.grad(value, x_hat)[0]
            s.denoiser.zero_grad(set_to_none=True)
            value = compute(s.denoiser(s.low))
            value.backward()
            return value.detach(), _gradient(s.denoiser)

        return step

    sides = {"taskloss": side(ours), "by hand": side(theirs)}
    agree(case, "taskloss and by hand", sides["taskloss"](), sides["by hand"](), options.tolerance)
    for name, turn in sides.items():
        with Live() as live:
            turn()
        case.values[f"MB of tensors at the peak, {name}"] = live.peak / 1e6
    peaks = [case.values[f"MB of tensors at the peak, {name}"] for name in sides]
    case.values["tensors at the peak, taskloss / by hand"] = peaks[0] / peaks[1]
    case.targets = [
        Target("seconds", "taskloss", "by hand", at_most=1.02),
        Target("value", "tensors at the peak, taskloss / by hand", at_most=1.01),
        Target("peak_bytes", "taskloss", "by hand", at_most=1.01),
    ]
    case.notes = [
        "Without the denoiser: the three terms forward and backward to x_hat."
        if alone
        else "The denoiser forward, the three terms, and backward into the denoiser's weights; no optimiser, no critic "
        "step: they are the same lines on both sides.",
        "taskloss checks every value for NaN, as it does unless told not to; the lines by hand do not.",
    ]
    return compare(case, sides, options)


def published(options: Options) -> Case:
    """The critic's and the generator's step, both optimisers included, as the authors' training script has them."""
    ours, theirs = scene(options), scene(options)
    case = Case(f"whole training step, {' x '.join(map(str, ours.low.shape))}")
    loss = _loss(ours)
    sides = {"taskloss": _house_step(ours, loss), "published way": _published_step(theirs)}
    agree(case, "taskloss and published way", sides["taskloss"](), sides["published way"](), 10 * options.tolerance)
    case.targets = [
        Target("seconds", "published way", "taskloss", at_least=1.3),
        Target("peak_bytes", "taskloss", "published way", at_most=1.0),
    ]
    case.notes = [
        "One critic step and one generator step with RMSprop and clipping.",
        "The published way runs the denoiser once for the critic, with a graph that is never used, and again for the "
        "generator; T computes gradients of its weights, which pile up; the critic's are computed and thrown away.",
        f"All networks have 1/{32 // WIDTH} of the paper's widths.",
    ]
    return compare(case, sides, options)


def _loss(s: Scene) -> LossSum:
    return LossSum(
        adv=AdversarialLoss(s.critic),
        task=TaskOrientedLoss(s.segmenter, nn.CrossEntropyLoss()),
        mse=0.5 * Fidelity(nn.MSELoss()),
    )


def _house_step(s: Scene, loss: LossSum) -> Callable[[], tuple[Tensor, Tensor]]:
    opt_g, opt_d = (torch.optim.RMSprop(net.parameters(), lr=5e-4) for net in (s.denoiser, s.critic))

    def step() -> tuple[Tensor, Tensor]:
        x_hat = s.denoiser(s.low)
        s.critic.step(opt_d, x_hat.detach(), s.reference)
        value = loss(x_hat, reference=s.reference, label=s.label)
        opt_g.zero_grad()
        value.backward()
        opt_g.step()
        return value.detach(), _gradient(s.denoiser)

    return step


def _published_step(s: Scene) -> Callable[[], tuple[Tensor, Tensor]]:
    critic = s.critic.network
    opt_g, opt_d = (torch.optim.RMSprop(net.parameters(), lr=5e-4) for net in (s.denoiser, critic))

    def step() -> tuple[Tensor, Tensor]:
        real = critic(s.reference)
        fake = critic(s.denoiser(s.low).detach())
        opt_d.zero_grad()
        (fake.mean() - real.mean()).backward()
        opt_d.step()
        for weight in critic.parameters():
            weight.data.clamp_(-CLIP, CLIP)
        x_hat = s.denoiser(s.low)
        mse = F.mse_loss(x_hat, s.reference)
        adv = -critic(x_hat).mean()
        task = F.cross_entropy(s.segmenter(x_hat), s.label)
        value = adv + task + mse / 2
        opt_d.zero_grad()
        opt_g.zero_grad()
        value.backward()
        opt_g.step()
        return value.detach(), _gradient(s.denoiser)

    return step


def _gradient(network: nn.Module) -> Tensor:
    # As one vector: a bias before a normalisation has a gradient of rounding errors alone.
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
