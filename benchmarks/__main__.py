"""Every benchmark, or some by name: ``python -m benchmarks [NAME ...] --device cpu``.

Each runs in a process of its own, one after the other, and adds its cases to ``results/<machine>.json``; `page.py`
makes the page and the plots of it. ``--compare`` reports what became slower than the committed result instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .harness import Options, process_peak_bytes

NAMES = (
    "step", "limit", "lean", "checkpointing", "sharing", "balancing", "maps", "critic", "consistency", "start",
    "scaling", "simulation", "denoising", "data", "projection", "busy",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "taskloss", "torch", "monai", "torchjd", "captum", "piq", "lpips", "pyiqa", "astra-toolbox", "scikit-image",
    "deepinv", "gecatsim", "numpy", "scipy",
)  # fmt: skip
SLOWER = 0.10  # what counts as a regression of a median
MEASURED = 3  # how often a benchmark is run before a comparison is left open
OPEN = "; cannot tell, the intervals overlap"


def main(arguments: list[str] | None = None) -> int:
    """Run, write, and print one line for each target."""
    args = parser().parse_args(arguments)
    if args.run:  # the child's part: one benchmark in this process
        args.into.write_text(json.dumps(run_here(args.run, options_of(args))))
        return 0
    from . import page

    name = args.machine or machine_name(args.device)
    path = args.results / f"{name}.json"
    if args.compare:
        committed = json.loads(path.read_text())
        print("\n".join(chain.from_iterable(compared(name, committed, args) for name in args.names or NAMES)))
        return 0
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and args.names else {"benchmarks": {}}
    found |= {"machine": describe_machine(args.device), "versions": versions()}
    at = {"commit": commit()}  # of each benchmark: some are measured anew while others stay
    for benchmark in args.names or NAMES:
        found["benchmarks"][benchmark] = run_apart(benchmark, args) | at
        args.results.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(path)
        print("\n".join(page.lines_of(benchmark, found["benchmarks"][benchmark])), flush=True)
    page.write(args.results, args.page)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)} (default: all)")
    top.add_argument("--device", default="cpu")
    top.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    top.add_argument("--rounds", type=int, default=Options.rounds)
    top.add_argument("--quick", action="store_true", help="small sizes, two rounds: does it run and agree?")
    top.add_argument("--results", type=Path, default=RESULTS)
    top.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="the page to write")
    top.add_argument("--machine", help="name of the result (default: made of the processor or the GPU)")
    top.add_argument("--compare", action="store_true", help="report what became slower than the result of this machine")
    top.add_argument("--run", help=argparse.SUPPRESS)
    top.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return top


def options_of(args: argparse.Namespace) -> Options:
    """What a benchmark is told."""
    return Options(torch.device(args.device), getattr(torch, args.dtype), args.rounds, args.quick)


def run_here(name: str, options: Options) -> dict[str, Any]:
    """One benchmark in this process."""
    if name not in NAMES:
        raise SystemExit(f"{name}: there is no such benchmark; expected some of {', '.join(NAMES)}")
    module = import_module(f"benchmarks.{name}")
    began = time.perf_counter()
    cases = module.run(options)
    return {
        "about": (module.__doc__ or "").strip(),
        "cases": [asdict(case) for case in cases],
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": process_peak_bytes(),
    }


def run_apart(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One benchmark in a process of its own; what goes wrong there is kept in words, never passed over."""
    words = [sys.executable, "-m", "benchmarks", "--run", name, "--device", args.device, "--dtype", args.dtype]
    words += ["--rounds", str(args.rounds), *(["--quick"] if args.quick else [])]
    print(f"{name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        ended = subprocess.run([*words, "--into", str(into)], env={**os.environ, "TASKLOSS_QUIET": "1"})
        if not into.exists():
            return {"failed": f"ended with status {ended.returncode} before its result"}
        found: dict[str, Any] = json.loads(into.read_text())
    return found


def compared(name: str, committed: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """One benchmark beside its committed result, measured again while the intervals leave open what became worse."""
    found = run_apart(name, args)
    for _ in range(MEASURED - 1):
        if not any(line.endswith(OPEN) for line in slower(name, committed, found)):
            break
        found = pooled(found, run_apart(name, args))
    return slower(name, committed, found) or [f"{name}: nothing is worse by more than {SLOWER:.0%}"]


def pooled(found: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Two runs of a benchmark as one: the rounds of both."""
    more = {case["name"]: case["seconds"] for case in again.get("cases", [])}
    for case in found.get("cases", []):
        for side, samples in more.get(case["name"], {}).items():
            case["seconds"][side] += samples
    return found


def slower(name: str, committed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Every target of a benchmark whose ratio grew by more than `SLOWER`, in words, or for which that is open.

    Ratios of sides that took turns in one run are compared, for the absolute times of a shared machine are noise.
    """
    from . import page

    lines = []
    before = {case["name"]: case for case in committed["benchmarks"].get(name, {}).get("cases", [])}
    for case in found.get("cases", []):
        for target in case["targets"] if case["name"] in before else []:
            new, old = page.ratio_of(case, target), page.ratio_of(before[case["name"]], target)
            if target["at_most"] is None:
                new, old = old, new
            if new[0] > (1 + SLOWER) * old[0]:
                told = f"{page.number_of(before[case['name']], target)}, is {page.number_of(case, target)}"
                sure = new[1] > (1 + SLOWER) * old[2] or target["quantity"] != "seconds"
                lines.append(f"{name}, {case['name']}: {page.words(target)} was {told}{'' if sure else OPEN}")
    if "failed" in found:
        lines.append(f"{name}: {found['failed']}")
    return lines


def machine_name(device: str) -> str:
    """A name for a file: the GPU's, or the processor's with its number of cores."""
    if device.startswith("cuda"):
        words = torch.cuda.get_device_name(device)
    else:
        words = f"{_processor()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def describe_machine(device: str) -> dict[str, Any]:
    """The hardware, as the system tells it."""
    found: dict[str, Any] = {"device": device, "processor": _processor(), "cores": os.cpu_count()}
    found |= {"system": platform.system(), "python": platform.python_version()}
    found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        found |= {"gpu": about.name, "gpu_memory_gb": round(about.total_memory / 1e9, 1)}
    return found


def commit() -> str:
    """The commit that is checked out; with a mark where files differ from it."""
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """What was installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
