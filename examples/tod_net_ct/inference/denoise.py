"""Denoise a CT scan of any size within a memory budget: NIfTI or DICOM in, NIfTI or DICOM out."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..networks import load_weights, weights_of
from ..scans import (
    Scan,
    Series,
    check_folder,
    check_nifti_name,
    check_place,
    read_scan,
    read_series,
    write_scan,
    write_segmentation,
    write_series,
)
from .memory import features_gib
from .tiles import STATISTICS, Report, denoise_volume, device_of


def denoise_file(
    checkpoint: str | os.PathLike[str],
    input: str | os.PathLike[str],  # noqa: A002  (the command line's own word)
    output: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    tile: Sequence[int] | None = None,
    statistics: str = "whole",
    memory_gb: float | None = None,
    overwrite: bool = False,
    series: str | None = None,
    template: str | os.PathLike[str] | None = None,
    task: str | os.PathLike[str] | None = None,
    assume_hu: bool = False,
    show_progress: bool = False,
) -> list[Path]:
    """Denoise a scan: a NIfTI file or a DICOM series, to either.

    NIfTI keeps shape, affine, orientation and dtype; for DICOM see `dicom_out.write_series`. The HU window is the
    checkpoint's. Voxels outside it keep their stored value; the rest is rounded to the nearest stored number. Each
    output appears whole or not at all.

    Args:
        checkpoint: file from `save_checkpoint`, a folder from `export`, or the id of a hub's repository of one.
        input: CT in HU: `.nii`, `.nii.gz`, or a folder of DICOM slices.
        output: `.nii`, `.nii.gz`, or any other name for a folder of DICOM slices.
        device, tile, statistics: see `denoise_volume`.
        memory_gb: GB that the whole program may take (8), on a GPU its memory (four fifths of what is free).
        overwrite: whether an existing output is replaced.
        series: SeriesInstanceUID, where the input holds several.
        template: for NIfTI in and DICOM out, the series on the same grid whose tags the output takes.
        task: weights of a task network; its label map of the denoised scan goes to a NIfTI file beside the output.
        assume_hu: whether values are taken for HU that do not look like them.
        show_progress: whether a bar with the time left is drawn on stderr.

    Returns:
        The paths of the outputs: the scan, then the label map if any, as NIfTI and, of a DICOM series, as a DICOM
        segmentation object.

    Raises:
        ValueError: in one sentence, for whatever is wrong with the files or options; checked before the work begins.
    """
    source, target = Path(os.path.abspath(input)), Path(os.path.abspath(output))
    is_nifti = target.name.endswith((".nii", ".nii.gz"))
    label_path = check_nifti_name(_label_name(target)) if task is not None else None
    if is_nifti:
        check_nifti_name(target)
    seg_path = _seg_name(target) if task is not None and source.is_dir() else None
    for path in filter(None, (target if is_nifti else None, label_path, seg_path)):
        _check_file(path, source, overwrite)
    if not is_nifti:
        check_folder(target, source, overwrite=overwrite)
    device = device_of(device)
    weights = weights_of(checkpoint)
    network = load_weights(weights)
    task_network = _load_task(task) if task is not None else None
    scan = _read(source, series, assume_hu)
    like = _like(scan, target, is_nifti, template, overwrite)
    volumes_gb = (2 if like is scan else 3) * 4 * scan.volume_hu.numel() / 1e9  # the volume, the result, the template
    budget_gib = features_gib(memory_gb, volumes_gb, device) if tile is None else 0.0
    window_hu = network.facts["window_hu"]
    with _bar(source.name) if show_progress else _silence() as progress:
        result_hu = denoise_volume(
            network, scan.volume_hu, window_hu, tile, device, progress, statistics=statistics, memory_gib=budget_gib
        )
    if isinstance(like, Series) and not is_nifti:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
        method = f"Denoised with taskloss tod_net_ct, weights {digest}, HU window {window_hu[0]:g} to {window_hu[1]:g}"
        write_series(target, result_hu, like, method=method, overwrite=overwrite)
    else:
        write_scan(target, result_hu, like)
    if task is None or task_network is None or label_path is None:
        return [target]
    label = _segment(result_hu, scan, task_network, device)
    paths = [target, _write_label(label_path, label, scan)]
    if isinstance(scan, Series) and seg_path is not None:
        # laid over the denoised series where there is one, else over the source
        files = scan.slices if is_nifti else sorted(target.iterdir())
        names = _label_names(task_network, max(1, int(label.max())))
        paths.append(write_segmentation(seg_path, label, scan, files, names, method=Path(task).name))
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand `denoise`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="trained denoiser: best.pt, a folder from `export`, or a repository id owner/name of a model hub",
    )
    parser.add_argument("--input", required=True, metavar="SCAN", help="CT in HU: .nii, .nii.gz or a DICOM folder")
    parser.add_argument(
        "--output", required=True, metavar="SCAN", help=".nii, .nii.gz, or another name for a new DICOM folder"
    )
    parser.add_argument("--series", metavar="UID", help="SeriesInstanceUID, where the folder holds several CT series")
    parser.add_argument(
        "--template", metavar="FOLDER", help="NIfTI to DICOM: the series on the same grid whose tags the output takes"
    )
    parser.add_argument(
        "--task", metavar="WEIGHTS", help="also write this task network's label map (NIfTI) beside the output"
    )
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="memory that the whole program may take (default: 8), on a GPU its memory (default: most of what is free)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        nargs=3,
        metavar=("SLICES", "ROWS", "COLUMNS"),
        help="tile size in voxels (default: the best that fits --memory-gb)",
    )
    parser.add_argument(
        "--statistics",
        choices=STATISTICS,
        default="whole",
        help="instance norm in tiles: of the whole volume (default, no seams) or of each tile",
    )
    parser.add_argument(
        "--assume-hu", action="store_true", help="take the values for HU although they do not look like them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand `denoise`; a wrong file or option raises a one-sentence ValueError."""
    paths = denoise_file(
        args.checkpoint,
        args.input,
        args.output,
        device=args.device,
        tile=args.tile,
        statistics=args.statistics,
        memory_gb=args.memory_gb,
        overwrite=args.overwrite,
        series=args.series,
        template=args.template,
        task=args.task,
        assume_hu=args.assume_hu,
        show_progress=True,
    )
    for path in paths:
        print(f"wrote {path}")
    return 0


def _check_file(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse to lose a file before the work begins."""
    if target.resolve() == source.resolve() or (target.exists() and source.exists() and target.samefile(source)):
        raise ValueError(f"{target.name}: expected another file than the input, got the input itself; rename --output")
    if target.exists() and not overwrite:
        raise ValueError(f"{target.name}: expected a new file, got one that exists; add --overwrite to replace it")


def _read(source: Path, series: str | None, assume_hu: bool) -> Scan:
    if source.is_dir():
        return read_series(source, series, assume_hu=assume_hu)
    if series is not None:
        raise ValueError(f"{source.name}: expected a folder of DICOM files for --series, got none; leave --series out")
    if not source.exists() and not source.name.endswith((".nii", ".nii.gz")):
        raise ValueError(
            f"{source.name}: expected a NIfTI file or a folder of DICOM files, got none at {source}; check the path"
        )
    if source.is_file():
        with source.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                raise ValueError(
                    f"{source.name}: expected a NIfTI file or a folder, got one DICOM file; give the series' folder"
                )
    return read_scan(source, assume_hu=assume_hu)


def _like(scan: Scan, target: Path, is_nifti: bool, template: str | os.PathLike[str] | None, overwrite: bool) -> Scan:
    """The scan whose geometry and tags the output takes."""
    if is_nifti or isinstance(scan, Series):
        if template is not None:
            raise ValueError("template: expected for NIfTI in and DICOM out alone; leave --template out")
        return scan
    if template is None and scan.path.is_dir():
        raise ValueError(
            f"{target.name}: expected a name in .nii or .nii.gz, since enhanced multi-frame CT is read but not "
            "written; or give a series of single slices on the same grid as --template"
        )
    if template is None:
        raise ValueError(
            f"{target.name}: expected a name in .nii or .nii.gz, since a NIfTI file has no patient or study to write "
            "as DICOM; or give the DICOM folder that it came from as --template"
        )
    like = read_series(template)
    check_folder(target, like.path, overwrite=overwrite)
    if like.volume_hu.shape != scan.volume_hu.shape:
        raise ValueError(
            f"{like.path.name}: expected a template of {tuple(scan.volume_hu.shape)} slices, rows and columns, got "
            f"{tuple(like.volume_hu.shape)}; give the series that {scan.path.name} was made from"
        )
    check_place(like.path, "a template", like.affine, like.axes, like.flipped, scan)
    return like


def _load_task(path: str | os.PathLike[str]) -> nn.Module:
    from ..networks import load_network

    return load_network(path)


def _label_name(target: Path) -> Path:
    stem = target.name.removesuffix(".gz").removesuffix(".nii")
    return target.with_name(f"{stem}-label.nii.gz")


def _seg_name(target: Path) -> Path:
    return _label_name(target).with_name(_label_name(target).name.replace(".nii.gz", ".dcm"))


def _segment(volume_hu: Tensor, scan: Scan, network: nn.Module, device: torch.device) -> Tensor:
    """The task network's label map of a denoised scan, on the scan's grid."""
    from .segmentation import segment

    return segment(
        network.to(device), volume_hu, scan.voxel_mm, getattr(network, "facts", {}).get("voxel_mm"), device=device
    )


def _label_names(network: nn.Module, n: int) -> list[str]:
    """What the classes from 1 to n are called: as the network's training said, else by number."""
    names = list(getattr(network, "facts", {}).get("class_names") or [])
    return [*names[:n], *(f"class {k}" for k in range(len(names) + 1, n + 1))]


def _write_label(path: Path, label: Tensor, scan: Scan) -> Path:
    header = scan.header.copy()
    header.set_data_dtype("uint8")
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"], header["cal_max"] = 0, 0  # the display window of an image
    return write_scan(path, label.float(), replace(scan, header=header))


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # A tile may take minutes: the time left is told from the last hour's, not from rich's half minute.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)


@contextmanager
def _silence() -> Iterator[None]:
    yield None
