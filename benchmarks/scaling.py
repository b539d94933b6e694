"""How cost grows: with the volume, the batch, the number of terms, of task networks and of processes."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Target, compare
from examples.tod_net_ct.networks import unet
from taskloss import AdversarialLoss, Fidelity, LossSum, TaskOrientedLoss, WassersteinCritic

DEPTH, SIDES, QUICK_SIDES = 16, (32, 48, 64, 96), (8, 16)
SIDE, QUICK_SIDE = 48, 16
COUNTS, QUICK_COUNTS = (1, 2, 4, 8), (1, 2)
PROCESSES = (1, 2)
TASK_WIDTH = 8


def run(options: Options) -> list[Case]:
    """One case for each axis."""
    side, counts = (QUICK_SIDE, QUICK_COUNTS) if options.quick else (SIDE, COUNTS)
    sides = QUICK_SIDES if options.quick else SIDES
    return [
        _curve("voxels", {DEPTH * s * s: _step(options, side=s) for s in sides}, options),
        _curve("batch", {n: _step(options, side=side, batch=n) for n in counts}, options),
        _curve("terms", {n: _step(options, side=side, n_terms=n) for n in counts}, options),
        _curve("task networks", {n: _step(options, side=side, n_networks=n) for n in counts}, options),
        processes(options),
    ]


def _curve(axis: str, steps: dict[int, Callable[[], Any]], options: Options) -> Case:
    case = Case(f"cost by {axis}")
    compare(case, {f"{n} {axis}": step for n, step in steps.items()}, options)
    points = [(n, statistics.median(case.seconds[f"{n} {axis}"])) for n in steps]
    case.curve = {"axis": axis, "points": {"taskloss": points}}
    case.values[f"seconds grow with {axis} to the power of"] = exponent(points)
    case.targets = [Target("value", f"seconds grow with {axis} to the power of", at_most=1.1)]
    case.notes = ["Loss and gradient at x_hat."]
    return case


def _step(
    options: Options, *, side: int, batch: int = 1, n_terms: int = 0, n_networks: int = 1
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A task term with a number of networks and a mean squared error; or a number of terms, each with its network."""
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    x, reference = torch.rand(2, batch, 1, DEPTH, side, side, **to)
    label = (reference[:, 0] > 0.5).long()
    if n_terms:
        terms = {f"task_{i}": TaskOrientedLoss(unet(TASK_WIDTH), nn.CrossEntropyLoss()) for i in range(n_terms)}
        loss = LossSum(**terms)
    else:
        networks = [unet(TASK_WIDTH) for _ in range(n_networks)]
        loss = LossSum(task=TaskOrientedLoss(networks, nn.CrossEntropyLoss()), mse=Fidelity(nn.MSELoss()))
    loss.to(**to)

    def step() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        value = loss(x_hat, reference=reference, label=label)
        return value.detach(), torch.autograd.grad(value, x_hat)[0]

    return step


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the straight line through the points on logarithmic axes."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return float(statistics.linear_regression(x, y).slope)


def processes(options: Options) -> Case:
    """A whole step, critic's and generator's, on one batch that is divided among processes."""
    case = Case("cost by processes")
    if options.device.type == "cuda" and torch.cuda.device_count() < max(PROCESSES):
        case.gaps.append(f"processes: {max(PROCESSES)} need as many CUDA devices")
        return case
    counts = PROCESSES[-1:] if options.quick else PROCESSES
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_process, (n, options, folder), nprocs=n)
            case.seconds[f"{n} processes"] = json.loads((Path(folder) / "seconds.json").read_text())
    points = [(n, statistics.median(case.seconds[f"{n} processes"])) for n in counts]
    case.curve = {"axis": "processes", "points": {"taskloss": points}}
    if len(points) > 1:
        case.values["seconds grow with processes to the power of"] = exponent(points)
        case.targets = [Target("value", "seconds grow with processes to the power of", at_most=0.0)]
    case.notes = [
        "Small convolutional networks as denoiser and T, the critic's and the generator's step, gloo, one thread each; "
        "-1 would be perfect.",
        "The processes of one count run after those of another: not in turns.",
    ]
    return case


def _process(rank: int, n: int, options: Options, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    device = torch.device("cuda", rank) if options.device.type == "cuda" else options.device
    torch.manual_seed(0)
    to = {"device": device, "dtype": options.dtype}
    side = QUICK_SIDE if options.quick else SIDE
    size = (DEPTH, side, side)
    low, reference = torch.rand(2, max(PROCESSES) * 2 // n, 1, *size, **to)
    label = (reference[:, 0] > 0.5).long()
    layers = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 1, 3, padding=1))
    denoiser = nn.parallel.DistributedDataParallel(layers.to(**to))
    critic = WassersteinCritic(patch_size=size).to(**to)
    segmenter = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 3, padding=1))
    task = TaskOrientedLoss(segmenter, nn.CrossEntropyLoss()).to(**to)
    loss = LossSum(adv=AdversarialLoss(critic), task=task, mse=Fidelity(nn.MSELoss()))
    opt_g, opt_d = (torch.optim.RMSprop(net.parameters(), lr=5e-4) for net in (denoiser, critic))
    seconds = []
    for _ in range(1 + (2 if options.quick else options.rounds)):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        x_hat = denoiser(low)
        critic.step(opt_d, x_hat.detach(), reference)
        opt_g.zero_grad()
        loss(x_hat, reference=reference, label=label).backward()
        opt_g.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds[1:]))  # without the warm-up
    dist.barrier()  # one that leaves while another still answers ends in an abort now and then
    dist.destroy_process_group()
