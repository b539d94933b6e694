"""A consistency term on top of a task term: one network for both, which runs once, against a network for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Live, Options, Target, agree, compare
from examples.tod_net_ct.networks import unet
from taskloss import Frozen, LossSum, TaskConsistencyLoss, TaskOrientedLoss, soft_kl

SIZE, QUICK_SIZE = (1, 1, 32, 96, 96), (1, 1, 8, 16, 16)
TASK_WIDTH = 16
PEAK = "bytes of tensors at the peak"
ALONE, BOTH, CACHED, APART = "task term alone", "both terms", "both terms, reference kept", "both terms, a network each"


def run(options: Options) -> list[Case]:
    """Loss and gradient at x_hat."""
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    x, reference = torch.rand(2, *(QUICK_SIZE if options.quick else SIZE), **to)
    label = (x[:, 0] > 0.5).long()
    network = unet(TASK_WIDTH).eval().to(**to)
    case = Case(f"task and consistency through T, {' x '.join(map(str, x.shape))}")
    one = Frozen(network)
    task = TaskOrientedLoss(one, nn.CrossEntropyLoss())
    losses = {
        ALONE: LossSum(task=task),
        BOTH: LossSum(task=task, seen=TaskConsistencyLoss(one, soft_kl)),
        CACHED: LossSum(task=task, seen=TaskConsistencyLoss(one, soft_kl, cache=True)),
        APART: LossSum(task=task, seen=TaskConsistencyLoss(network, soft_kl)),
    }
    sides = {name: _side(loss, x, reference, label) for name, loss in losses.items()}
    for name, loss in losses.items():
        case.values[f"{name}: {PEAK}"] = _peak(loss, x, reference, label)
    case.values[f"{BOTH} / {APART}: {PEAK}"] = case.values[f"{BOTH}: {PEAK}"] / case.values[f"{APART}: {PEAK}"]
    for name in (BOTH, CACHED):
        agree(case, f"{name} and {APART}", sides[name](), sides[APART](), options.tolerance)
    case.targets = [
        Target("seconds", CACHED, ALONE, at_most=1.15),
        Target("seconds", BOTH, APART, at_most=0.75),
        Target("value", f"{BOTH} / {APART}: {PEAK}", at_most=1.0),
    ]
    case.notes = [
        "T alone is two passes, forward and back to the image. A second term with a network of its own adds two, and a "
        "third for its reference, without a graph; with one network for both only the reference's is left.",
        "Kept means cache=True and an equal reference at each step: then nothing but the distance is left.",
    ]
    return [compare(case, sides, options)]


def _peak(loss: LossSum, x: Tensor, reference: Tensor, label: Tensor) -> int:
    x_hat = x.clone().requires_grad_()
    weights = (t for m in loss.modules() if isinstance(m, Frozen) for t in m.network.state_dict().values())
    with Live(x_hat, reference, label, *weights) as live:
        loss(x_hat, reference=reference, label=label).backward()
    return live.peak


def _side(loss: LossSum, x: Tensor, reference: Tensor, label: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def step() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        value = loss(x_hat, reference=reference, label=label)
        return value.detach(), torch.autograd.grad(value, x_hat)[0]

    return step
