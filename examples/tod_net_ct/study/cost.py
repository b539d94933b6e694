"""What the paper's settings cost: measured at full width on small sub-volumes, and from there estimated for a GPU.

``python -m examples.tod_net_ct cost`` trains a few steps of TOD-Net for each side, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..dose import degrade
from ..networks import Denoiser
from ..run import PRESETS, write_text
from ..scans import prepare
from ..training import train_denoiser, train_task
from .results import RESULTS

PAPER = PRESETS["paper"]
# Assumptions of the estimate, not measurements: an H100's speed in 3-D convolutions, and a scan of LiTS at 1 mm.
TFLOPS = {"TF32": 100.0, "bf16": 250.0}
SLICES_PER_SCAN, SCANS = 400, {"LiTS": 91, "KiTS": 126}
N_DENOISERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96], help="rows and columns of the sub-volumes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cost.json")


def main(args: argparse.Namespace) -> int:
    """Measure each side in a fresh process, whose peak memory is its own, and write ``cost.json``."""
    if len(args.sides) < 2:
        raise ValueError(f"--sides: expected at least two, to tell what grows with the voxels, got {args.sides}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        measured = pool.map(measure, args.sides, chunksize=1)
    write_text(args.results / "cost.json", json.dumps(measured, indent=1) + "\n")
    print("\n".join(sentences(measured)))
    return 0


def measure(side: int) -> dict[str, float]:
    """CPU seconds of a step and the peak memory (GB) of a training with one sub-volume of ``32 x side x side``."""
    settings = replace(
        PAPER, n_train=2, n_validation=1, n_test=1, shape=(PAPER.shape[0], side, side),
        voxel_mm=(6.0, 384 / side, 384 / side), n_views=60, task_networks=("unet",), task_steps=(1,), task_batch=1,
        epochs=0, batch=1, validate_every=10_000, accelerator="cpu", devices="1",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        prepare(settings, run)
        degrade(settings, run)
        train_task("unet", settings, run)
        seconds = {}
        for steps in (1, 3):  # start and validation cost both the same
            began = time.process_time()
            train_denoiser("tod_net", replace(settings, steps=steps), run)
            seconds[steps] = time.process_time() - began
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"side": side, "cpu_seconds_per_step": round((seconds[3] - seconds[1]) / 2, 1), "peak_gb": round(peak, 2)}


def flop_per_voxel(width: int) -> float:
    """Floating-point operations of the denoiser's forward and backward pass for one voxel."""
    weights = sum(p.numel() for p in Denoiser(width).parameters() if p.dim() > 1)
    return 3 * 2 * weights  # every weight meets every voxel once; the backward pass is twice the forward


def sentences(measured: Sequence[dict[str, Any]]) -> list[str]:
    """The measurement and the estimate, in words, for the README."""
    depth, rows, columns = PAPER.shape
    whole = PAPER.batch * depth * rows * columns
    parts = [m["side"] ** 2 * depth for m in measured]
    each = [m["cpu_seconds_per_step"] / n for m, n in zip(measured, parts, strict=True)]
    first, last = measured[0], measured[-1]
    slope = (last["peak_gb"] - first["peak_gb"]) / (parts[-1] - parts[0])
    flop = whole * flop_per_voxel(PAPER.width)
    step = {name: flop / (speed * 1e12) for name, speed in TFLOPS.items()}
    n_parts = 1 + (SLICES_PER_SCAN - depth) // int(depth * (1 - PAPER.overlap))
    hours = {
        data: {n: -(-scans * n_parts // PAPER.batch) * PAPER.epochs * s / 3600 for n, s in step.items()}
        for data, scans in SCANS.items()
    }
    both = {name: N_DENOISERS * sum(by[name] for by in hours.values()) for name in TFLOPS}
    seen = "; ".join(
        f"{m['cpu_seconds_per_step']:.0f} s of CPU time a step and {m['peak_gb']:.1f} GB at the peak for {m['side']} x "
        f"{m['side']}"
        for m in measured
    )
    return [
        f"Measured at full width (denoiser {PAPER.width}, U-Net {PAPER.task_width}) in float32 on a CPU, one "
        f"sub-volume of {depth} slices: {seen}. "
        f"Linear in the voxels, a step of the paper's {PAPER.batch} x {depth} x {rows} x {columns} takes "
        f"{min(each) * whole / 60:.0f} to {max(each) * whole / 60:.0f} minutes of a core and about "
        f"{slope * whole:.0f} GB.",
        "",
        f"Estimated, not measured: the denoiser's two passes are {flop / 1e12:.0f} TFLOP a step, which an H100 does in "
        + " or ".join(f"{s:.1f} s ({name} at {TFLOPS[name]:.0f} TFLOP/s)" for name, s in step.items())
        + f". With {SLICES_PER_SCAN} slices a scan, {PAPER.epochs} epochs of LiTS take "
        + " or ".join(f"{h:.0f}" for h in hours["LiTS"].values())
        + f" GPU hours for one denoiser, and {N_DENOISERS} of them on LiTS and KiTS "
        + " or ".join(f"{h:.0f}" for h in both.values())
        + ", without the task networks and the simulation. `recompute=true` and `precision=bf16-mixed` are there to "
        "make batch 4 fit. None of this has been run on a GPU.",
    ]
