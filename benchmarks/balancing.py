"""``GradientBalancer`` at x_hat beside what goes back through the denoiser once per loss."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Target, agree, compare, without
from examples.tod_net_ct.networks import Denoiser
from taskloss import Fidelity, GradientBalancer, LossSum

SIZE, QUICK_SIZE = (8, 32, 32), (4, 8, 8)
WIDTH, QUICK_WIDTH = 4, 2
COUNTS, QUICK_COUNTS = (3, 5, 8), (3, 5)
OURS = {"per loss": "taskloss, shares", "PCGrad": "taskloss, PCGrad", "UPGrad": "taskloss, UPGrad"}
THEIRS = {
    "per loss": "one backward per loss",
    "PCGrad": "PCGrad at the parameters",
    "UPGrad": "UPGrad at the parameters",
}


def _slope(x: Tensor) -> Tensor:
    return x.diff(dim=-1)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "charbonnier": lambda x, y: ((x - y).square() + 1e-3).sqrt().mean(),
    "slope": lambda x, y: F.l1_loss(_slope(x), _slope(y)),
    "huber": F.smooth_l1_loss,
    "coarse": lambda x, y: F.mse_loss(F.avg_pool3d(x, 2), F.avg_pool3d(y, 2)),
    "mean": lambda x, y: (x.mean((2, 3, 4)) - y.mean((2, 3, 4))).square().mean(),
    "curvature": lambda x, y: F.mse_loss(_slope(_slope(x)), _slope(_slope(y))),
}


def run(options: Options) -> list[Case]:
    """One case for each number of terms, and one with the curve over them."""
    counts = QUICK_COUNTS if options.quick else COUNTS
    cases = [_case(k, options) for k in counts]
    points = {
        side: [(k, statistics.median(case.seconds[side])) for k, case in zip(counts, cases, strict=True)]
        for side in cases[0].seconds
    }
    curve = Case("cost by number of terms", curve={"axis": "terms", "points": points})
    for side, line in points.items():
        curve.values[f"{side}: {counts[-1]} terms / {counts[0]} terms"] = line[-1][1] / line[0][1]
    return [*cases, curve]


def _case(k: int, options: Options) -> Case:
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    denoiser = Denoiser(QUICK_WIDTH if options.quick else WIDTH).to(**to)
    low, reference = torch.rand(2, 2, 1, *(QUICK_SIZE if options.quick else SIZE), **to)
    criteria = dict(list(CRITERIA.items())[:k])
    loss = LossSum(**{name: Fidelity(criterion) for name, criterion in criteria.items()})

    def losses() -> list[Tensor]:
        x_hat = denoiser(low)
        return [criterion(x_hat, reference) for criterion in criteria.values()]

    def ours(**how: Any) -> Callable[[], Tensor]:
        balancer = GradientBalancer(loss, **how)

        def step() -> Tensor:
            denoiser.zero_grad(set_to_none=True)
            balancer.backward(denoiser(low), reference=reference)
            return _gradient(denoiser)

        return step

    case = Case(f"{k} terms, {' x '.join(map(str, low.shape))}")
    sides = {
        OURS["per loss"]: ours(shares=dict.fromkeys(criteria, 1.0)),
        THEIRS["per loss"]: _per_loss(denoiser, losses),
    }
    try:
        from torchjd.aggregation import Mean, PCGrad, UPGrad
    except ImportError:
        case.gaps.append(without("torchjd"))
    else:
        agree(
            case,
            "taskloss and torchjd, gradients averaged",
            ours(aggregator=Mean())(),
            _at_parameters(denoiser, losses, Mean())(),
            options.tolerance,
        )
        for name, aggregator in (("PCGrad", PCGrad), ("UPGrad", UPGrad)):
            sides |= {
                OURS[name]: ours(aggregator=aggregator()),
                THEIRS[name]: _at_parameters(denoiser, losses, aggregator()),
            }
    agree(
        case, "taskloss and plain backward, gradients averaged", *_averaged(ours, losses, denoiser), options.tolerance
    )
    case.targets = [
        Target("seconds", THEIRS[name], OURS[name], at_least=k / 2) for name in OURS if THEIRS[name] in sides
    ]
    case.notes = [
        "The denoiser forward, the terms, and backward into its weights.",
        "Weights that are made at x_hat are others than those made at the parameters, so what is asserted equal is "
        "the plain average of the gradients, by the same two ways.",
    ]
    return compare(case, sides, options)


def _per_loss(denoiser: nn.Module, losses: Callable[[], list[Tensor]]) -> Callable[[], Tensor]:
    """By hand: every loss's gradient through the whole denoiser, each at the same norm."""
    parameters = list(denoiser.parameters())

    def step() -> Tensor:
        denoiser.zero_grad(set_to_none=True)
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in losses()]
        norms = [torch.cat([g.flatten() for g in row]).norm() for row in rows]
        for i, parameter in enumerate(parameters):
            parameter.grad = sum(row[i] / norm / len(rows) for row, norm in zip(rows, norms, strict=True))
        return _gradient(denoiser)

    return step


def _at_parameters(denoiser: nn.Module, losses: Callable[[], list[Tensor]], aggregator: Any) -> Callable[[], Tensor]:
    """torchjd's way: every loss's gradient through the whole denoiser, aggregated there."""
    from torchjd.autojac import backward, jac_to_grad

    parameters = list(denoiser.parameters())

    def step() -> Tensor:
        denoiser.zero_grad(set_to_none=True)
        backward(losses(), inputs=parameters)
        jac_to_grad(parameters, aggregator)
        return _gradient(denoiser)

    return step


def _averaged(
    ours: Callable[..., Callable[[], Tensor]], losses: Callable[[], list[Tensor]], denoiser: nn.Module
) -> tuple[Tensor, Tensor]:
    first = ours(aggregator=lambda rows: rows.mean(0))()
    denoiser.zero_grad(set_to_none=True)
    torch.stack(losses()).mean().backward()
    return first, _gradient(denoiser)


def _gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
