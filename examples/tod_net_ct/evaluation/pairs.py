"""Denoisers on real pairs of low and normal dose: is the scan nearer to its normal dose than before?"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..inference import denoise_volume
from ..metrics import image_quality, mean_and_sd, paired
from ..networks import load_denoiser
from ..run import progress, write_text
from ..scans import find_cases, read_low_dose, read_scan

QUALITY = ("whole_rmse_hu", "whole_psnr_db", "whole_ssim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("data", type=Path, help="folder of pairs, such as NAME_full and NAME_quarter")
    parser.add_argument(
        "--checkpoint", action="append", required=True, metavar="NAME=FILE", help="a denoiser and its name; repeatable"
    )
    parser.add_argument("--patient", help="this patient's pairs alone")
    parser.add_argument("--output", type=Path, default=Path("runs/pairs"), help="where pairs.csv and pairs.json go")


def main(args: argparse.Namespace) -> int:
    """Measure, write, and print the means."""
    for item in args.checkpoint:
        if "=" not in item:
            raise ValueError(f"--checkpoint {item}: expected NAME=FILE, for example --checkpoint tod_net=best.pt")
    networks = {name: load_denoiser(path) for name, path in (item.split("=", 1) for item in args.checkpoint)}
    restorers = {name: partial(denoise_volume, network) for name, network in networks.items()}
    rows = measure_pairs(args.data, restorers, args.patient)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(args.output / "pairs.csv", text.getvalue())
    found = compare(rows)
    write_text(args.output / "pairs.json", json.dumps(found, indent=1) + "\n")
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {numbers[key]['mean']:.2f}" for key in QUALITY))
    return 0


def measure_pairs(
    data: Path, restorers: Mapping[str, Callable[[Tensor], Tensor]], patient: str | None = None
) -> list[dict[str, Any]]:
    """A row for each pair and denoiser ("none" for the low dose as it came): RMSE, PSNR and SSIM against normal dose.

    Raises:
        ValueError: the folder holds no pairs, or a file cannot be used.
    """
    cases = [case for case in find_cases(data) if case.low is not None and patient in (None, case.patient)]
    if not cases:
        raise ValueError(f"{data}: expected pairs like NAME_full.nii.gz and NAME_quarter.nii.gz, found none")
    rows = []
    for case in progress(cases, "real pairs"):
        scan = read_scan(case.scan)
        assert case.low is not None
        low_hu = read_low_dose(case.low, scan).volume_hu
        everywhere = (scan.volume_hu > -1e9).to(scan.volume_hu.dtype)
        images = {"none": low_hu}
        images |= {name: restore(low_hu) for name, restore in restorers.items()}
        for name, image in images.items():
            quality = image_quality(image, scan.volume_hu, everywhere)
            rows.append({"case": case.name, "denoiser": name, **{key: round(quality[key], 4) for key in QUALITY}})
    return rows


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over pairs, and each denoiser's paired difference from the low dose as it came."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["denoiser"] for row in rows):
        found[name] = {}
        for key in QUALITY:
            own, before = ([r[key] for r in rows if r["denoiser"] == n] for n in (name, "none"))
            found[name][key] = mean_and_sd(own)
            if name != "none":
                found[name][key]["change"] = paired(own, before)
    return found
