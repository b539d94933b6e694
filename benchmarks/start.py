"""Import and first call in fresh interpreters: what ``import taskloss`` adds to ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.harness import Case, Options, Target

# Each prints the seconds of its stages, in order.
_SCRIPT = """
import time
stages = [time.perf_counter()]
import torch
stages.append(time.perf_counter())
{library}
stages.append(time.perf_counter())
x_hat = torch.ones(1, 1, 8, 8, device="{device}", requires_grad=True)
reference, label = torch.zeros_like(x_hat), torch.zeros(1, 8, 8, dtype=torch.long, device="{device}")
T = torch.nn.Conv2d(1, 2, 3, padding=1).to("{device}").eval().requires_grad_(False)
{loss}
value.backward()
stages.append(time.perf_counter())
print(*[after - before for before, after in zip(stages, stages[1:])])
"""
_SIDES = {
    "import torch": {
        "library": "",
        "loss": "value = torch.nn.functional.cross_entropy(T(x_hat), label)\n"
        "value = value + 0.5 * torch.nn.functional.mse_loss(x_hat, reference)",
    },
    "import torch, taskloss": {
        "library": "from taskloss import Fidelity, LossSum, TaskOrientedLoss",
        "loss": "loss = LossSum(task=TaskOrientedLoss(T, torch.nn.CrossEntropyLoss()),"
        " mse=0.5 * Fidelity(torch.nn.MSELoss()))\n"
        "value = loss(x_hat, reference=reference, label=label)",
    },
}


def run(options: Options) -> list[Case]:
    """One case: both sides take turns, each turn in an interpreter of its own."""
    case = Case("import and first call")
    stages: dict[str, list[list[float]]] = {name: [] for name in _SIDES}
    for turn in range(1 if options.quick else options.rounds):
        names = list(_SIDES) if turn % 2 else list(reversed(_SIDES))
        for name in names:
            stages[name].append(_turn(name, options))
    case.seconds = {name: [sum(turn) for turn in turns] for name, turns in stages.items()}
    _, library, first_ours = (
        statistics.median(column) for column in zip(*stages["import torch, taskloss"], strict=True)
    )
    first_by_hand = statistics.median(turn[2] for turn in stages["import torch"])
    case.values = {
        "ms more to import taskloss after torch": 1e3 * library,
        "ms more for the first loss and its gradient": 1e3 * (first_ours - first_by_hand),
        "ms more in all": 1e3 * (library + first_ours - first_by_hand),
    }
    case.targets = [Target("value", "ms more in all", at_most=50.0)]
    case.notes = [
        "Seconds are those of all stages: both imports, and the first loss with its gradient, by hand "
        "where there is no library.",
        "What taskloss adds is taken from its own stages: torch's import alone varies by more than the whole of it.",
    ]
    return [case]


def _turn(name: str, options: Options) -> list[float]:
    script = _SCRIPT.format(device=options.device, **_SIDES[name])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]
