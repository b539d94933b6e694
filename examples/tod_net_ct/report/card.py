"""A trained denoiser to hand on: its weights and a card that says what it has seen and what it is good for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..evaluation import heading, read_summary
from ..networks import load_denoiser, write_weights
from ..run import PRESETS, Settings, digest, from_yaml, write_text
from ..scans import in_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand `export`."""
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="a finished run, evaluated")
    parser.add_argument("--denoiser", default="tod_net", metavar="NAME", help="which of its denoisers (tod_net)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--licence", required=True, help="of the weights, as an SPDX id such as CC-BY-4.0")
    parser.add_argument("--data", metavar="TEXT", help="what it was trained on, for the card; needed for scans")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand `export`."""
    print(f"wrote {export(args.run, args.denoiser, args.output, licence=args.licence, data=args.data)}")
    return 0


def export(run: Path, denoiser: str, output: Path, *, licence: str, data: str | None = None) -> Path:
    """Write `denoiser.safetensors` and its card `README.md` into a new folder.

    Args:
        run: folder of a run whose denoiser was trained and evaluated.
        denoiser: its name in that run.
        output: the folder; it must not hold files yet.
        licence: of the weights.
        data: what it was trained on, in words; phantoms say so themselves.

    Returns:
        The folder.

    Raises:
        ValueError: the run lacks the denoiser or its evaluation, the folder is not empty, or data are not named.
    """
    checkpoint = run / "denoisers" / denoiser / "best.pt"
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output.name}: expected a new or empty folder, got one that holds files; choose another")
    network = load_denoiser(checkpoint)
    settings = from_yaml(run / "settings.yaml", PRESETS["demo"])
    if data is None and settings.data:
        raise ValueError("export: expected --data to say what the denoiser was trained on, got nothing; name the scans")
    if not (run / "evaluation" / "summary.json").exists():
        raise ValueError(f"{run.name}: expected a run with evaluation/summary.json, got none; run `evaluate` first")
    summary = read_summary(run)
    data = data or "seeded abdominal phantoms (no patient's image)"
    network.facts |= {"i0_photons": settings.i0_photons, "dose_fraction": settings.dose_fraction, "data": data}
    network.facts |= {"licence": licence, "weights": digest(checkpoint)}
    write_weights(output, network)
    write_text(output / "README.md", written(network.facts, network.config, denoiser, settings, summary))
    return output


def written(
    facts: dict[str, Any], config: dict[str, Any], denoiser: str, settings: Settings, summary: dict[str, Any]
) -> str:
    """The card in Markdown, with the header that model hubs read."""
    lower, upper = facts["window_hu"]
    dose = f"{settings.i0_photons:g} photons a ray"
    if settings.dose_fraction:
        dose = f"{settings.dose_fraction:g} of the normal dose, which counts as {dose}"
    lines = [
        "---",
        f"license: {facts['licence'].lower()}",
        "library_name: taskloss",
        "pipeline_tag: image-to-image",
        "tags: [low-dose-ct, denoising, task-oriented-loss]",
        "---",
        f"# {heading(denoiser)}: a denoiser of low-dose CT",
        "",
        "For research. No medical device; a denoised image is no substitute for the original.",
        "",
        "| | |",
        "|---|---|",
        f"| trained on | {facts['data']} |",
        f"| cases | {settings.n_train or 'split by patient'} for training, {summary['n_cases']} in the test |",
        f'| dose | {dose}, simulated by the route "{settings.route}" |',
        f"| HU window | {lower:g} to {upper:g}; voxels outside it are left as they are |",
        f"| voxel size (slice, row, column) | {' x '.join(f'{side:g}' for side in settings.voxel_mm)} mm |",
        f"| network | 3-D, width {config['width']}, norm {config['norm']}; seed {facts.get('seed', 'unknown')} |",
        f"| task | {in_words(settings.organ)}, guided by {', '.join(settings.guides)} |",
        f"| licence of the weights | {facts['licence']} |",
        f"| checkpoint | sha256 {facts['weights']} |",
        "",
        "## Measured on its test cases, at low dose",
        "",
        *measured(denoiser, summary["means"]["low"]),
        "",
        "On another scanner, kernel, dose or body part it was not measured, and may make images worse.",
        "",
        "## Use",
        "",
        "```sh",
        "python -m examples.tod_net_ct denoise --checkpoint FOLDER --input scan.nii.gz --output denoised.nii.gz",
        "```",
        "",
    ]
    return "\n".join(lines)


def measured(denoiser: str, means: dict[str, Any]) -> list[str]:
    """The denoiser's means beside those of the image as it came, as rows of a table."""
    if denoiser not in means:
        raise ValueError(
            f"{denoiser}: expected a denoiser that was evaluated, got one of {', '.join(means)}; evaluate it"
        )
    rows = ["| mean over cases | low dose as it came | denoised |", "|---|---|---|"]
    for key, found in means[denoiser].items():
        before, after = means["none"][key]["mean"], found["mean"]
        if after is not None and math.isfinite(after):
            rows.append(f"| {key} | {'' if before is None else f'{before:.4g}'} | {after:.4g} |")
    return rows
