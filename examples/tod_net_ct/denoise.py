"""Denoise a CT volume of any size: NIfTI in, NIfTI out, in overlapping tiles within a memory budget."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .networks import Denoiser, load_denoiser
from .volumes import WINDOW_HU, check_nifti_name, read_scan, to_hu, to_unit, write_scan

Report = Callable[[float], object]
_STATISTICS = ("whole", "tile")


@torch.no_grad()
def denoise_volume(
    network: Denoiser,
    volume_hu: Tensor,
    window_hu: tuple[float, float] = WINDOW_HU,
    tile: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    progress: Report | None = None,
    *,
    statistics: str = "whole",
    memory_gib: float = 4.0,
) -> Tensor:
    """Denoise a volume of any size in tiles that overlap by the network's receptive radius.

    **Outside the window.** The network saw every value clamped and cannot know what lies beyond (air, bone, metal).
    So a voxel whose *input* HU lies more than half the window's width beyond `window_hu` (below -400 or above 400) is
    returned unchanged, bit for bit. One that lies beyond by less may be soft tissue that noise carried out: it takes
    the denoised value if that is back inside by more than a tenth of the width (40 HU), and else is returned
    unchanged too. Without this, every outlier would stay as a speckle. A voxel inside the window stays inside: what
    the network puts beyond is clamped, since nothing in training ever lay there.

    **Tiles.** Each tile is read with a halo of `network.receptive_radius` voxels, so the tiled result equals the
    untiled one to rounding. Instance norm also takes the mean and variance of all that it sees. With
    `statistics="whole"` these are first measured over the whole volume, layer by layer, which keeps the equality and
    costs the time of about 3.5 more passes; `"tile"` takes each tile's own, in one pass, and then neighbouring tiles
    differ in contrast, with visible seams. A volume that fits in one tile needs neither.

    Args:
        network: left as found; a copy in eval mode does the work.
        volume_hu: `(D, H, W)` in HU, finite.
        window_hu: the window that the network was trained with.
        tile: slices, rows and columns of a tile without its halo; None takes the largest that fits `memory_gib`.
        device: where the tiles are computed.
        progress: called with the share of the work that is done, in (0, 1], ending with 1.
        statistics: `"whole"` or `"tile"`; matters for instance norm in more than one tile alone.
        memory_gib: budget in GiB for the network's features when `tile` is None.

    Returns:
        `(D, H, W)` float32 in HU, on the CPU.

    Raises:
        ValueError: the volume is not 3-D and finite, an option is wrong, or the device lacks memory for a tile.

    Reference:
        TOD-Net, section 3.3 ("works directly on the original volume"); the rules on tiles and window are ours.
    """
    if volume_hu.ndim != 3 or volume_hu.numel() == 0:
        raise ValueError(f"volume_hu: expected (D, H, W), got {tuple(volume_hu.shape)}; denoise one volume at a time")
    if not bool(torch.isfinite(volume_hu).all()):
        raise ValueError("volume_hu: expected finite HU, got NaN or infinity; replace these voxels, e.g. by -1024")
    if statistics not in _STATISTICS:
        raise ValueError(f"statistics: expected one of {_STATISTICS}, got {statistics!r}; 'whole' leaves no seams")
    device = _device(device)
    volume_hu = volume_hu.detach().to("cpu", torch.float32)
    size = _checked_tile(tile) if tile is not None else _largest_tile(volume_hu.shape, network, memory_gib)
    tiles = list(_tiles(tuple(volume_hu.shape), size, network.receptive_radius))
    unit = to_unit(volume_hu, window_hu)
    lower, upper = window_hu
    band, back = (upper - lower) / 2, (upper - lower) / 10
    far = (volume_hu < lower - band) | (volume_hu > upper + band)
    result_hu = volume_hu.clone()
    network = copy.deepcopy(network).to(device).eval()
    report = progress if progress is not None else lambda share: None

    done = 0.0
    try:
        if len(tiles) > 1 and statistics == "whole":
            done = _fix_statistics(network, unit, tiles, device, report)
        for n, part in enumerate(tiles, start=1):
            if not bool(far[part.core].all()):  # a tile of air alone is returned as it came
                restored = network(unit[part.read][None, None].to(device))[0, 0][part.core_in_read].cpu()
                restored_hu = to_hu(restored.float().clamp_(0, 1), window_hu)
                given_hu = volume_hu[part.core]
                stays_below = (given_hu < lower) & (restored_hu <= lower + back)
                stays_above = (given_hu > upper) & (restored_hu >= upper - back)
                kept = far[part.core] | stays_below | stays_above
                result_hu[part.core] = torch.where(kept, given_hu, restored_hu)
            report(done + (1 - done) * n / len(tiles))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device}: expected memory for tiles of {'x'.join(map(str, size))}, got too little; give a smaller --tile"
        ) from error
    return result_hu


def denoise_file(
    checkpoint: str | os.PathLike[str],
    input: str | os.PathLike[str],  # noqa: A002  (the command line's own word)
    output: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    tile: Sequence[int] | None = None,
    statistics: str = "whole",
    memory_gib: float = 4.0,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """Denoise a NIfTI file into another of the same shape, affine, orientation and dtype.

    The HU window is the checkpoint's. Voxels outside it keep their stored value; the rest is rounded to the nearest
    stored number for integer dtypes and clipped to the dtype's range. The output appears whole or not at all.

    Args:
        checkpoint: file from `save_checkpoint`.
        input: CT in HU, `.nii` or `.nii.gz`.
        output: `.nii` or `.nii.gz`, in a folder that exists.
        device, tile, statistics, memory_gib: see `denoise_volume`.
        overwrite: whether an existing output is replaced.
        show_progress: whether a bar with the time left is drawn on stderr.

    Returns:
        The path of the output.

    Raises:
        ValueError: in one sentence, for whatever is wrong with the files or options; checked before the work begins.
    """
    source, target = Path(input), check_nifti_name(output)
    if target.resolve() == source.resolve() or (target.exists() and source.exists() and target.samefile(source)):
        raise ValueError(f"{target.name}: expected another file than the input, got the input itself; rename --output")
    if target.exists() and not overwrite:
        raise ValueError(f"{target.name}: expected a new file, got one that exists; add --overwrite to replace it")
    device = _device(device)
    network = load_denoiser(checkpoint)
    scan = read_scan(source)
    with _bar(source.name) if show_progress else _silence() as progress:
        result_hu = denoise_volume(
            network,
            scan.volume_hu,
            network.facts["window_hu"],
            tile,
            device,
            progress,
            statistics=statistics,
            memory_gib=memory_gib,
        )
    return write_scan(target, result_hu, like=scan)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand `denoise`."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="trained denoiser")
    parser.add_argument("--input", required=True, metavar="NIFTI", help="CT volume in HU (.nii, .nii.gz)")
    parser.add_argument("--output", required=True, metavar="NIFTI", help="where the denoised volume goes")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps ...")
    parser.add_argument(
        "--tile",
        type=int,
        nargs=3,
        metavar=("SLICES", "ROWS", "COLUMNS"),
        help="tile size in voxels (default: the largest that fits --memory-gib)",
    )
    parser.add_argument("--memory-gib", type=float, default=4.0, metavar="GIB", help="memory for one tile (default: 4)")
    parser.add_argument(
        "--statistics",
        choices=_STATISTICS,
        default="whole",
        help="instance norm in tiles: of the whole volume (default, no seams) or of each tile (faster)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand `denoise`; a wrong file or option raises a one-sentence ValueError."""
    path = denoise_file(
        args.checkpoint,
        args.input,
        args.output,
        device=args.device,
        tile=args.tile,
        statistics=args.statistics,
        memory_gib=args.memory_gib,
        overwrite=args.overwrite,
        show_progress=True,
    )
    print(f"wrote {path}")
    return 0


class _Tile(NamedTuple):
    read: tuple[slice, ...]  # of the volume, halo included
    core: tuple[slice, ...]  # of the volume, without it
    core_in_read: tuple[slice, ...]


def _tiles(shape: Sequence[int], size: Sequence[int], halo: int) -> Iterator[_Tile]:
    """Cut a volume into cores that cover each voxel once, with their halos cut off at the volume's faces."""
    sides = []
    for length, step in zip(shape, size, strict=True):
        side = []
        for start in range(0, length, step):
            stop = min(start + step, length)
            first = max(start - halo, 0)
            read = slice(first, min(stop + halo, length))
            side.append((read, slice(start, stop), slice(start - first, stop - first)))
        sides.append(side)
    for parts in itertools.product(*sides):
        yield _Tile(*(tuple(kind) for kind in zip(*parts, strict=True)))


def _largest_tile(shape: Sequence[int], network: Denoiser, memory_gib: float) -> tuple[int, ...]:
    """Halve the longest side until a tile and its halo fit the budget."""
    size = list(shape)
    voxels = memory_gib * 2**30 / network.bytes_per_voxel
    while math.prod(min(s + 2 * network.receptive_radius, n) for s, n in zip(size, shape, strict=True)) > voxels:
        longest = size.index(max(size))
        if size[longest] <= network.receptive_radius:  # smaller tiles would compute halo and nothing else
            raise ValueError(f"memory_gib: expected room for a tile, got {memory_gib:g} GiB; give more, or --tile")
        size[longest] = -(-size[longest] // 2)
    return tuple(size)


def _checked_tile(tile: Sequence[int]) -> tuple[int, ...]:
    if len(tile) != 3 or any(n < 1 for n in tile):
        raise ValueError(f"tile: expected slices, rows and columns of at least 1, got {tuple(tile)}; e.g. 32 128 128")
    return tuple(int(n) for n in tile)


class _EnoughError(Exception):
    """Ends a forward pass at the layer that is being measured; what follows would be thrown away."""


def _fix_statistics(network: Denoiser, unit: Tensor, tiles: list[_Tile], device: torch.device, report: Report) -> float:
    """Give each instance norm of `network` the statistics of the whole volume, first layer to last.

    A layer's statistics need those of all earlier layers, hence one partial pass per layer. Returns the share of the
    whole work, the final pass included, that this took.
    """
    norms = [norm for norm in network.norms if isinstance(norm, nn.InstanceNorm3d)]
    if not norms:
        return 0.0
    weights = [conv.weight.numel() for conv in (*network.widen, *network.narrow)]
    costs = list(itertools.accumulate(weights))  # of a pass that ends after each convolution
    total, done = sum(costs), 0.0
    for norm, cost in zip(norms, costs[:-1], strict=True):
        count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])
            raise _EnoughError

        with norm.register_forward_pre_hook(stop):
            for part in tiles:
                with suppress(_EnoughError):
                    network(unit[part.read][None, None].to(device))
                core = seen.pop()[(0, slice(None), *part.core_in_read)].flatten(1)  # (channels, voxels)
                var, tile_mean = (v.cpu().double() for v in torch.var_mean(core, 1, correction=0))
                n = core.shape[1]
                step = tile_mean - mean  # Chan, Golub and LeVeque's update: no large sums to cancel
                mean = mean + step * (n / (count + n))
                squares = squares + var * n + step.square() * (count * n / (count + n))
                count += n
                done += cost / total / len(tiles)
                report(done)
        norm.running_mean, norm.running_var = mean.float().to(device), (squares / count).float().to(device)
        norm.track_running_stats = True  # in eval mode: use these instead of the input's own
    return done


def _device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by its build
        raise ValueError(f"device: expected one that torch can use, got {str(device)!r}; use --device cpu") from error


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)


@contextmanager
def _silence() -> Iterator[None]:
    yield None
