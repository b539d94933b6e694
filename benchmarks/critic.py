"""A critic's step with gradient penalty beside the same lines by hand, in 2-D and in 3-D."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Target, agree, compare
from taskloss import GradientPenalty, WassersteinCritic

SHAPES = {2: (8, 1, 96, 96), 3: (2, 1, 16, 48, 48)}
QUICK_SHAPES = {2: (2, 1, 16, 16), 3: (2, 1, 8, 16, 16)}
WEIGHT = 10.0


def run(options: Options) -> list[Case]:
    """One case per number of spatial axes."""
    return [_case(dims, options) for dims in SHAPES]


def _case(dims: int, options: Options) -> Case:
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    shape = (QUICK_SHAPES if options.quick else SHAPES)[dims]
    x_hat, reference = torch.rand(2, *shape, **to)
    network = _network(dims).to(**to)
    by_hand = copy.deepcopy(network)
    penalty = GradientPenalty(WEIGHT, generator=torch.Generator(options.device).manual_seed(1))
    critic = WassersteinCritic(network=network, constraint=penalty)
    opt_d = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.0, 0.9))

    def ours() -> tuple[Tensor, Tensor]:
        value = critic.step(opt_d, x_hat, reference)
        return value.total.detach(), _gradient(network)

    sides = {"taskloss": ours, "by hand": _step_by_hand(by_hand, x_hat, reference)}
    case = Case(f"{dims}-D critic step with gradient penalty, {' x '.join(map(str, shape))}")
    agree(case, "taskloss and by hand", sides["taskloss"](), sides["by hand"](), options.tolerance)
    case.targets = [Target("seconds", "taskloss", "by hand", at_most=1.05)]
    case.notes = ["Both images, the penalty, backward and Adam's step, with the same random lines between the images."]
    return compare(case, sides, options)


def _step_by_hand(critic: nn.Module, x_hat: Tensor, reference: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator(x_hat.device).manual_seed(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
    per_sample = (x_hat.shape[0],) + (1,) * (x_hat.dim() - 1)

    def step() -> tuple[Tensor, Tensor]:
        fake, real = critic(x_hat).mean(), critic(reference).mean()
        alpha = torch.rand(per_sample, generator=generator, device=x_hat.device).to(x_hat)
        between = torch.lerp(x_hat, reference, alpha).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss = fake - real + WEIGHT * penalty
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), _gradient(critic)

    return step


def _network(dims: int) -> nn.Sequential:
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool: Any = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    layers = [
        layer
        for before, after, stride in ((1, 32, 2), (32, 64, 2), (64, 128, 1))
        for layer in (conv(before, after, 3, stride, 1), nn.LeakyReLU(0.2))
    ]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(128, 1))


def _gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
