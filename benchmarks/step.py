"""What a step with LossSum costs beside the same lines written by hand: ``python -m benchmarks.step --device cpu``.

Both sides take turns in one process, on the same inputs; the ratio of the medians is what counts. Before timing it
asserts that value and gradient agree.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import AdversarialLoss, Fidelity, LossSum, TaskOrientedLoss, WassersteinCritic


def segmenter() -> nn.Module:
    """A small 3-D convolutional network as T."""
    widths = (1, 16, 32, 16)
    layers = [
        module
        for a, b in zip(widths, widths[1:], strict=False)
        for module in (nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Conv3d(16, 2, 1)).eval()


def sides(device: torch.device, size: tuple[int, int, int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same loss of x_hat, with the library and by hand as an expert would write it."""
    torch.manual_seed(0)
    net = segmenter()
    critic = WassersteinCritic(patch_size=size).to(device)
    reference = torch.rand(2, 1, *size, device=device)
    label = (reference[:, 0] > 0.5).long()
    loss = LossSum(
        adv=AdversarialLoss(critic),
        task=TaskOrientedLoss(net, nn.CrossEntropyLoss()),
        mse=0.5 * Fidelity(nn.MSELoss()),
    ).to(device)
    loss.check_finite = False
    frozen = copy.deepcopy(net).to(device).requires_grad_(False)
    judge = copy.deepcopy(critic.network).requires_grad_(False)

    def by_hand(x_hat: Tensor) -> Tensor:
        task = F.cross_entropy(frozen(x_hat), label)
        return -judge(x_hat).mean() + task + 0.5 * F.mse_loss(x_hat, reference)

    return {"LossSum": lambda x_hat: loss(x_hat, reference=reference, label=label), "by hand": by_hand}


def seconds(step: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The time of one forward and backward pass to x_hat."""
    x_hat = x.clone().requires_grad_()
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(x_hat).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> float:
    """Print the medians and return their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--size", nargs=3, type=int, default=(16, 64, 64))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(arguments)
    both = sides(args.device, tuple(args.size))
    x = torch.rand(2, 1, *args.size, device=args.device)
    results = []
    for step in both.values():
        x_hat = x.clone().requires_grad_()
        value = step(x_hat)
        value.backward()
        results.append((value.detach(), x_hat.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    samples: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(args.rounds):
        for name, step in both.items():
            samples[name].append(seconds(step, x))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    ratio = medians["LossSum"] / medians["by hand"]
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds, sizes {tuple(args.size)}")
    print(", ".join(f"{name} {1e3 * m:.1f} ms" for name, m in medians.items()) + f"; ratio of medians {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    main()
