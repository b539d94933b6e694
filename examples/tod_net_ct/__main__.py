"""The command line: ``python -m examples.tod_net_ct run demo`` and ``denoise``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import denoise
from .degrade import degrade
from .evaluate import evaluate
from .prepare import prepare
from .report import report
from .settings import PRESETS, Settings
from .train_denoiser import train_denoiser
from .train_task import train_task


def run_all(settings: Settings, run: Path) -> Path:
    """Every stage in order; a stage that is done is skipped."""
    prepare(settings, run)
    degrade(settings, run)
    train_task(settings, run)
    for name in settings.denoisers:
        train_denoiser(name, settings, run)
    evaluate(settings, run)
    return report(settings, run)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn a caller's mistake into one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m examples.tod_net_ct", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all stages of a preset, on phantoms or on your scans")
    run.add_argument("preset", choices=sorted(PRESETS))
    run.add_argument("--output", type=Path, help="folder of the run (default: runs/<preset>)")
    run.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting; repeatable")
    denoise.add_arguments(commands.add_parser("denoise", help="restore one NIfTI volume"))
    args = parser.parse_args(arguments)
    try:
        if args.command == "denoise":
            return denoise.main(args)
        for item in args.set:
            if "=" not in item:
                raise ValueError(f"--set {item}: expected FIELD=VALUE, for example --set steps=500")
        settings = PRESETS[args.preset].with_overrides(dict(item.split("=", 1) for item in args.set))
        folder = args.output or Path("runs") / args.preset
        began = time.perf_counter()
        page = run_all(settings, folder)
        print((folder / "table.md").read_text())
        print(f"{page} after {time.perf_counter() - began:.0f} s")
        return 0
    except (ValueError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
