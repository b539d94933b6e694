"""T checkpointed, and lean, against T under autograd's own rules: what is held, the peak, and the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Live, Options, Target, agree, compare
from benchmarks.lean import memory, networks, passes
from benchmarks.step import Scene, scene
from examples.tod_net_ct.networks import unet
from taskloss import Fidelity, Frozen, LossSum, TaskOrientedLoss

HELD, PEAK = "bytes held between forward and backward", "bytes at the peak"
NO_GRAPH = "forward alone, no graph"  # what no recomputation can go below
SIZE, QUICK_SIZE = (32, 96, 96), (8, 16, 16)
TASK_WIDTH = 16
SIDES: dict[str, dict[str, Any]] = {"checkpointed": {"checkpoint": True}, "lean": {}, "stored": {"lean": False}}
NOT_LEAN: dict[str, Any] = {"checkpoint": True, "lean": False}
PIECEWISE = ("3-D U-Net, batch norm", "ResNet-18", "MONAI SegResNet", "ViT-Ti/16")
TIME = {"checkpointed": 1.4, "lean": 1.0}
OURS = [name for name in SIDES if name != "stored"]


def run(options: Options) -> list[Case]:
    """T alone, the generator's step that users pay for, and networks of other libraries, piece by piece."""
    cases = [alone(options), in_a_step(options)]
    return cases if options.quick else [*cases, *(in_pieces(name, options) for name in PIECEWISE)]


def in_pieces(name: str, options: Options) -> Case:
    """One network of the page of lean networks, checkpointed with and without lean, against stored."""
    torch.manual_seed(0)
    network = networks()[name]
    to = {"device": options.device, "dtype": options.dtype}
    module, x = network.build().eval().to(**to), torch.rand(network.size, **to)
    case = Case(f"{name} in pieces, {' x '.join(map(str, x.shape))}")
    frozen = {side: Frozen(module, **how) for side, how in {**SIDES, "checkpointed, not lean": NOT_LEAN}.items()}
    sides = {side: passes(one, x) for side, one in frozen.items()}
    for side, one in frozen.items():
        agree(case, f"{side} and stored", sides[side](), sides["stored"](), options.tolerance)
        case.values[f"{side}: {HELD}"], case.values[f"{side}: {PEAK}"] = memory(one, x)
    with Live(x, *module.parameters(), *module.buffers()) as live, torch.no_grad():
        module(x)
    case.values[f"{NO_GRAPH}: {PEAK}"] = live.peak
    for side in (*frozen, NO_GRAPH):
        if side != "stored":
            case.values[f"{side} / stored: {PEAK}"] = case.values[f"{side}: {PEAK}"] / case.values[f"stored: {PEAK}"]
    for side in ("checkpointed", "checkpointed, not lean"):
        case.notes.append(f"{side}: {frozen[side].n_pieces or 'no'} pieces.")
        case.targets.append(Target("value", f"{side} / stored: {PEAK}", at_most=0.45))
        case.targets.append(Target("seconds", side, "stored", at_most=1.4))
    return compare(case, sides, options, rounds=min(options.rounds, 9))


def in_a_step(options: Options) -> Case:
    """The denoiser forward, the task loss and MSE, and backward into the denoiser's weights."""
    s = scene(options)
    case = Case(f"generator step, {' x '.join(map(str, s.low.shape))}")
    sides = {}
    for name, how in SIDES.items():
        task = TaskOrientedLoss(s.segmenter, nn.CrossEntropyLoss(), **how)
        sides[name] = _step(s, LossSum(task=task, mse=0.5 * Fidelity(nn.MSELoss())))
    for name in OURS:
        agree(case, f"{name} and stored", sides[name](), sides["stored"](), options.tolerance)
    case.targets = [Target("seconds", name, "stored", at_most=TIME[name]) for name in OURS]
    return compare(case, sides, options)


def _step(s: Scene, loss: LossSum) -> Callable[[], Tensor]:
    def step() -> Tensor:
        s.denoiser.zero_grad(set_to_none=True)
        value = loss(s.denoiser(s.low), reference=s.reference, label=s.label)
        value.backward()
        return value.detach()

    return step


def alone(options: Options) -> Case:
    """Loss and gradient at x_hat."""
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    x = torch.rand(1, 1, *(QUICK_SIZE if options.quick else SIZE), **to)
    label = (x[:, 0] > 0.5).long()
    segmenter = unet(TASK_WIDTH).eval()
    case = Case(f"task loss through T, {' x '.join(map(str, x.shape))}")
    sides: dict[str, Callable[[], Any]] = {}
    for name, how in SIDES.items():
        loss = TaskOrientedLoss(segmenter, nn.CrossEntropyLoss(), **how).to(**to)
        sides[name] = _side(loss, x, label)
        held, peak = _memory(loss, x, label)
        case.values[f"{name}: {HELD}"], case.values[f"{name}: {PEAK}"] = held, peak
    for name in OURS:
        agree(case, f"{name} and stored", sides[name](), sides["stored"](), options.tolerance)
        for what in (HELD, PEAK):
            case.values[f"{name} / stored: {what}"] = case.values[f"{name}: {what}"] / case.values[f"stored: {what}"]
    case.targets = [
        Target("value", f"checkpointed / stored: {HELD}", at_most=0.25),
        *(Target("value", f"{name} / stored: {PEAK}", at_most=0.45) for name in OURS),
        *(Target("seconds", name, "stored", at_most=TIME[name]) for name in OURS),
    ]
    case.notes = [
        "Held between forward and backward is what stays while the other terms and networks run; the peak is reached "
        "in T's own backward pass.",
        "T is frozen: stored, it takes two passes, forward and back to the image, and checkpointing adds a third.",
        "Lean is the default; what checkpoint=True computes again is lean as well.",
    ]
    return compare(case, sides, options)


def _side(loss: TaskOrientedLoss, x: Tensor, label: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def step() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        value = loss(x_hat, label)
        return value.detach(), torch.autograd.grad(value, x_hat)[0]

    return step


def _memory(loss: TaskOrientedLoss, x: Tensor, label: Tensor) -> tuple[int, int]:
    """Bytes of tensors held between forward and backward, and at the peak of both, beside those held before."""
    x_hat = x.clone().requires_grad_()
    with Live(x_hat, label, *loss.task_model.network.parameters(), *loss.task_model.network.buffers()) as live:
        value = loss(x_hat, label)
        held = live.bytes()
        value.backward()
    return held, live.peak
