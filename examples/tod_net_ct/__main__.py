"""The command line: every stage of the example, and ``run`` for all of them in order."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from .dose import degradation as degrade
from .evaluation import evaluate, pairs
from .inference import denoise
from .networks import TASK_NETWORKS
from .report import card, report
from .run import PRESETS, Settings, from_yaml, occupy
from .scans import prepare
from .study import calibration as calibrate
from .study import cost, cross_validation
from .study import seeds as study
from .training import FILTERS, RECIPES, machine, train_denoiser, train_task

PROGRAM = "tod-net-ct" if Path(sys.argv[0]).stem == "tod-net-ct" else "python -m examples.tod_net_ct"
EXTRAS = {"distributed": "cluster", "gecatsim": "faithful", "bm3d": "classics"}  # all other packages: ct


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn a caller's mistake into one sentence and exit code 2."""
    args = parser().parse_args(arguments)
    with _notes():
        return _run(args)


@contextmanager
def _notes() -> Iterator[None]:
    """Print the example's own warnings as one line each; what other libraries warn of is left as it is."""
    others = warnings.showwarning
    here = Path(__file__).parent

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if here in Path(filename).parents:
            print(f"note: {message}", file=sys.stderr)
        else:
            others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _run(args: argparse.Namespace) -> int:
    """The command that was typed: its exit code."""
    try:
        if args.command == "denoise":
            return denoise.main(args)
        own = {"study": study, "pairs": pairs, "cost": cost, "export": card, "cross-validate": cross_validation}
        if args.command in own:
            return own[args.command].main(args)
        began = time.perf_counter()
        settings = settings_of(args)
        result = COMMANDS[args.command](args, settings, args.output)
        if result is not None:
            print(f"{result} after {time.perf_counter() - began:.0f} s")
        return 0
    except (ValueError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("examples", "tod_net_ct", "taskloss"):
            raise
        extra = EXTRAS.get(package, "ct")
        print(f"{package}: expected this package, got none; pip install 'taskloss[{extra}]'", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}; nothing half-written was left, mend it and go on", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    top = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    helps = {
        "run": "all stages of a preset, on phantoms or on your scans",
        "prepare": "stage 1: cases from phantoms or a folder of scans, split by patient",
        "simulate": "stage 2: the low-dose counterpart of every case",
        "train-task": "stage 3: segmentation networks, on normal dose",
        "train-denoiser": "stage 4: denoisers",
        "evaluate": "stage 5: every denoiser on every test case, in numbers",
        "report": "stage 6: tables, figures and one page",
        "calibrate-dose": "find the number of photons at which the U-Net falls as the paper's did",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        add_settings(command)
        if name == "simulate":
            degrade.add_arguments(command)
        if name == "calibrate-dose":
            calibrate.add_arguments(command)
        if name in ("train-task", "train-denoiser"):
            command.add_argument("--only", nargs="+", metavar="NAME", help="these alone (default: all of the settings)")
    denoise.add_arguments(commands.add_parser("denoise", help="restore one volume: NIfTI or DICOM in and out"))
    card.add_arguments(commands.add_parser("export", help="a trained denoiser to hand on: weights and their card"))
    pairs.add_arguments(commands.add_parser("pairs", help="denoisers on real pairs of low and normal dose"))
    cost.add_arguments(commands.add_parser("cost", help="what a step of the paper's settings takes"))
    cross_validation.add_arguments(commands.add_parser("cross-validate", help="an experiment over patients and seeds"))
    study.add_arguments(commands.add_parser("study", help="the demo over several seeds: every denoiser, every network"))
    return top


def add_settings(command: argparse.ArgumentParser) -> None:
    """What every stage takes: a preset, changes to it, and the folder of the run."""
    command.add_argument("preset", choices=sorted(PRESETS))
    command.add_argument("--output", type=Path, help="folder of the run (default: runs/<preset>)")
    command.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings that differ from the preset")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The preset, then the file, then the command line; the outcome is written beside the run."""
    settings = PRESETS[args.preset]
    if args.config is not None:
        settings = from_yaml(args.config, settings)
    for item in args.set:
        if "=" not in item:
            raise ValueError(f"--set {item}: expected FIELD=VALUE, for example --set steps=500")
    settings = settings.with_overrides(dict(item.split("=", 1) for item in args.set))
    args.output = args.output or Path("runs") / args.preset
    occupy(args.output, settings.to_yaml())
    return settings


def run_all(args: argparse.Namespace, settings: Settings, run: Path) -> Path:
    """Every stage in order; a stage that is done is skipped. Several processes train together, the first does the
    rest.
    """
    fabric = machine(settings)
    if fabric.is_global_zero:
        prepare(settings, run)
        degrade.degrade(settings, run)
    fabric.barrier()
    train_tasks(args, settings, run, fabric)
    train_denoisers(args, settings, run, fabric)
    if fabric.is_global_zero:
        evaluate(settings, run)
        report(settings, run)
        print((run / "table.md").read_text())
    fabric.barrier()
    return run / "report.html"


def train_tasks(args: argparse.Namespace, settings: Settings, run: Path, fabric: Any = None) -> Path:
    """The task networks, one after the other."""
    for name in _only(args, settings.task_networks, TASK_NETWORKS):
        train_task(name, settings, run, fabric)
        if name in settings.oracles:
            train_task(name, replace(settings, task_dose="low"), run, fabric)
    return run / "task"


def train_denoisers(args: argparse.Namespace, settings: Settings, run: Path, fabric: Any = None) -> Path:
    """The denoisers, one after the other."""
    for name in _only(args, settings.denoisers, [*RECIPES, *FILTERS]):
        train_denoiser(name, settings, run, fabric)
    return run / "denoisers"


def _only(args: argparse.Namespace, names: Sequence[str], known: Iterable[str]) -> Sequence[str]:
    """The names that `--only` picks, or those of the settings."""
    picked: Sequence[str] = getattr(args, "only", None) or names
    for name in picked:
        if name.partition("@")[0] not in known:
            raise ValueError(f"--only {name}: expected one of {', '.join(known)}; for example --only {names[0]}")
    return picked


COMMANDS = {
    "run": run_all,
    "prepare": lambda args, settings, run: prepare(settings, run),
    "simulate": lambda args, settings, run: degrade.degrade(
        settings, run, jobs=args.jobs, dask=args.dask, shard=args.shard
    ),
    "train-task": train_tasks,
    "train-denoiser": train_denoisers,
    "evaluate": lambda args, settings, run: evaluate(settings, run),
    "report": lambda args, settings, run: report(settings, run),
    "calibrate-dose": lambda args, settings, run: calibrate.calibrate(settings, run, drop=args.drop),
}


if __name__ == "__main__":
    sys.exit(main())
