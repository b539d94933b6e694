"""Distance to the limit: T's own passes alone against the task loss, and T's speed against the machine's."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Case, Options, Target, agree, compare
from examples.tod_net_ct.networks import unet
from taskloss import TaskOrientedLoss

SIZE, QUICK_SIZE = (32, 96, 96), (8, 16, 16)
TASK_WIDTH = 16
MATRIX = {"cpu": 1024, "cuda": 8192}
CHANNELS = {"cpu": 32, "cuda": 128}  # of the convolution that tells the machine's speed


def run(options: Options) -> list[Case]:
    """One case: the passes, and a matrix product and a convolution of the machine's best shape beside them."""
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    x = torch.rand(1, 1, *(QUICK_SIZE if options.quick else SIZE), **to)
    label = (x[:, 0] > 0.5).long()
    segmenter = unet(TASK_WIDTH).eval().to(**to)
    frozen = copy.deepcopy(segmenter).requires_grad_(False)
    loss = TaskOrientedLoss(segmenter, nn.CrossEntropyLoss())
    weight = torch.ones_like(frozen(x))

    def passes() -> Tensor:
        x_hat = x.clone().requires_grad_()
        frozen(x_hat).backward(weight)
        return _gradient(x_hat)

    def task() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        value = loss(x_hat, label)
        value.backward()
        return value.detach(), _gradient(x_hat)

    def bare() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        value = F.cross_entropy(frozen(x_hat), label)
        value.backward()
        return value.detach(), _gradient(x_hat)

    case = Case(f"task loss through T, {' x '.join(map(str, x.shape))}")
    agree(case, "TaskOrientedLoss and bare autograd", task(), bare(), options.tolerance)
    product, convolution = _product(options, to), _convolution(options, to)
    sides: dict[str, Callable[[], Any]] = {
        "TaskOrientedLoss": task,
        "T and criterion, bare": bare,
        "T alone": passes,
        "matrix product": product,
        "convolution": convolution,
    }
    compare(case, sides, options)
    rates = {name: _flop(sides[name]) / statistics.median(case.seconds[name]) / 1e9 for name in list(sides)[2:]}
    case.values = {f"{name}: GFLOP/s": rate for name, rate in rates.items()}
    case.values["T alone / convolution, GFLOP/s"] = rates["T alone"] / rates["convolution"]
    case.values["T alone / matrix product, GFLOP/s"] = rates["T alone"] / rates["matrix product"]
    case.targets = [
        Target("seconds", "TaskOrientedLoss", "T alone", at_most=1.05),
        Target("seconds", "TaskOrientedLoss", "T and criterion, bare", at_most=1.05),
    ]
    case.notes = [
        "T alone is its forward pass and its backward pass to the image, frozen, in bare autograd; what the task loss "
        "takes beyond it is the criterion (cross entropy, at full resolution) and the library.",
        "The rates of the machine are those of one square matrix product and of a 3-D convolution with many channels.",
    ]
    return [case]


def _product(options: Options, to: dict[str, Any]) -> Callable[[], Tensor]:
    n = 256 if options.quick else MATRIX.get(options.device.type, 1024)
    a, b = torch.rand(n, n, **to), torch.rand(n, n, **to)
    return lambda: a @ b


def _convolution(options: Options, to: dict[str, Any]) -> Callable[[], Tensor]:
    channels = 16 if options.quick else CHANNELS.get(options.device.type, 32)
    image = torch.rand(1, channels, *(QUICK_SIZE if options.quick else (16, 48, 48)), **to)
    weight = torch.rand(channels, channels, 3, 3, 3, **to)

    def convolve() -> Tensor:
        with torch.no_grad():
            return F.conv3d(image, weight, padding=1)

    return convolve


def _gradient(x_hat: Tensor) -> Tensor:
    assert x_hat.grad is not None
    return x_hat.grad


def _flop(side: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        side()
    return int(counter.get_total_flops())
