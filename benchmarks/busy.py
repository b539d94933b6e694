"""The demo, smaller, with the machine to itself and beside another process that trains on as many threads as cores.

Two processes whose threads wait for each other by spinning slow each other down far more than twice; the example lets
its own sleep (`OMP_WAIT_POLICY`, in its first file).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Case, Options, Target

SMALLER = (
    "n_train=16", "n_validation=2", "n_test=2", "task_steps=60", "task_validate_every=30", "steps=12",
)  # fmt: skip
NEIGHBOUR = """
import torch
net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 1, 3, padding=1))
x = torch.rand(8, 16, 96, 96)
while True:
    net(x).sum().backward()
"""
QUIET, BUSY = "a quiet machine", "beside a busy process"


def run(options: Options) -> list[Case]:
    """One case: whole runs of the command, in turns."""
    preset = "smoke" if options.quick else "demo"
    case = Case(f"run {preset}, {'as it is' if options.quick else 'smaller'}", {QUIET: [], BUSY: []})
    for _ in range(1 if options.quick else min(options.rounds, 3)):
        case.seconds[QUIET].append(_demo(preset))
        with _neighbour():
            case.seconds[BUSY].append(_demo(preset))
    case.targets = [Target("seconds", BUSY, QUIET, at_most=2.5)]
    case.notes = [
        f"The neighbour trains a small network without a pause on {os.cpu_count()} threads.",
        "The whole command is timed, its imports and its report included.",
        *([] if options.quick else [f"Smaller: --set {' --set '.join(SMALLER)}."]),
    ]
    return [case]


def _demo(preset: str) -> float:
    words = [sys.executable, "-m", "examples.tod_net_ct", "run", preset]
    words += [word for setting in (SMALLER if preset == "demo" else ()) for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [*words, "--output", str(Path(folder) / "run")], check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "TASKLOSS_QUIET": "1"},
        )  # fmt: skip
        return time.perf_counter() - began


@contextlib.contextmanager
def _neighbour() -> Iterator[None]:
    """Another process that keeps every core busy, started and warm."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    with subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env={**os.environ, **threads}) as process:
        try:
            time.sleep(5)
            yield
            if process.poll() is not None:
                raise RuntimeError(
                    f"the busy process ended with status {process.returncode}: beside it, nothing was busy"
                )
        finally:
            process.kill()
