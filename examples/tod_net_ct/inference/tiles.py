"""A volume of any size through a denoiser: in overlapping tiles within a memory budget, equal to the whole."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..dose import WINDOW_HU, to_hu, to_unit
from ..networks import Denoiser
from .moments import Moments
from .streams import Streams, room

Report = Callable[[float], object]
STATISTICS = ("whole", "tile")


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
    `statistics="whole"` these are measured over the whole volume, layer by layer, which keeps the equality: within
    `memory_gib` the slices stream through the layers (`Streams`), and the more features it can keep, the nearer the
    time comes to that of one pass; with a `tile` each layer's statistics take another pass over the tiles, 4.5 in
    all. `"tile"` takes each tile's own, in one pass, and then neighbouring tiles differ in contrast, with visible
    seams. A volume that fits in one tile needs neither.

    **Memory.** The volume, the result (float32 both), and one tile's features or what is kept within the budget.

    Args:
        network: left as found; a copy in eval mode does the work.
        volume_hu: `(D, H, W)` in HU, finite.
        window_hu: the window that the network was trained with.
        tile: slices, rows and columns of a tile without its halo; None takes the best that fits `memory_gib`.
        device: where the tiles are computed; `"auto"` takes the GPU where there is one.
        progress: called with the share of the work that is done, in (0, 1], ending with 1.
        statistics: `"whole"` or `"tile"`; matters for instance norm in more than one tile alone.
        memory_gib: budget in GiB for the network's features when `tile` is None; time falls as it grows, until
            32 bytes a voxel for each unit of the network's width fit beside a few slices.

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
    if statistics not in STATISTICS:
        raise ValueError(f"statistics: expected one of {STATISTICS}, got {statistics!r}; 'whole' leaves no seams")
    device = device_of(device)
    to_unit(volume_hu[:1, :1, :1], window_hu)  # refuses a wrong window
    volume_hu = volume_hu.detach().to("cpu", torch.float32)
    size = tile_size(tile, tuple(volume_hu.shape), network, memory_gib)
    tiles = list(cut(volume_hu.shape, size, network.receptive_radius))
    result_hu = volume_hu.clone()
    network = copy.deepcopy(network).to(device).eval()
    report = progress if progress is not None else lambda share: None
    whole = len(tiles) > 1 and statistics == "whole"
    kept = room(network, volume_hu.shape, memory_gib * 2**30) if whole and tile is None else None

    def read(part: Tile) -> Tensor:
        return to_unit(volume_hu[part.read], window_hu)[None, None].to(device)

    def read_slices(part: slice) -> Tensor:
        return to_unit(volume_hu[part], window_hu).to(device)

    done = 0.0
    with _memory_errors(device, size), _full_precision(device):
        if kept is not None:
            for slices, restored in Streams(network, read_slices, volume_hu.shape, *kept).run(report):
                result_hu[slices] = keep_outside(volume_hu[slices], restored.cpu(), window_hu)
            return result_hu
        if whole:
            done = fix_statistics(network, read, tiles, report)
        for n, part in enumerate(tiles, start=1):
            given_hu = volume_hu[part.core]
            if not bool(far_outside(given_hu, window_hu).all()):  # a tile of air alone is returned as it came
                restored = network(read(part))[0, 0][part.core_in_read].cpu()
                result_hu[part.core] = keep_outside(given_hu, restored.float(), window_hu)
            report(done + (1 - done) * n / len(tiles))
    return result_hu


def far_outside(given_hu: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """Where a volume lies more than half the window's width beyond the window."""
    lower, upper = window_hu
    band = (upper - lower) / 2
    return (given_hu < lower - band) | (given_hu > upper + band)


def keep_outside(given_hu: Tensor, restored: Tensor, window_hu: tuple[float, float]) -> Tensor:
    """A denoiser's output in [0, 1] back in HU, with what the window hid put back: the rule of `denoise_volume`."""
    lower, upper = window_hu
    back = (upper - lower) / 10
    restored_hu = to_hu(restored.clamp(0, 1), window_hu)
    stays_below = (given_hu < lower) & (restored_hu <= lower + back)
    stays_above = (given_hu > upper) & (restored_hu >= upper - back)
    return torch.where(far_outside(given_hu, window_hu) | stays_below | stays_above, given_hu, restored_hu)


class Tile(NamedTuple):
    """One tile: what is read, what of it is kept."""

    read: tuple[slice, ...]  # of the volume, halo included
    core: tuple[slice, ...]  # of the volume, without it
    core_in_read: tuple[slice, ...]


def cut(shape: Sequence[int], size: Sequence[int], halo: int) -> Iterator[Tile]:
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
        yield Tile(*(tuple(kind) for kind in zip(*parts, strict=True)))


def best_size(shape: Sequence[int], halo: int, max_voxels: float) -> tuple[int, ...] | None:
    """The tile that reads the fewest voxels in all, halos included, of those that fit; None where none does.

    A tile is no thinner than its halo, unless the volume is: it would compute halo and nothing else.
    """
    sizes, held, read = [], [], []
    for axis, length in enumerate(shape):
        own = sorted({-(-length // n) for n in range(1, max(length // max(halo, 1), 1) + 1)}, reverse=True)
        parts = [[part.read[0] for part in cut((length,), (step,), halo)] for step in own]
        along = [1, 1, 1]
        along[axis] = len(own)
        sizes.append(own)
        held.append(np.array([max(r.stop - r.start for r in side) for side in parts], float).reshape(along))
        read.append(np.array([sum(r.stop - r.start for r in side) for side in parts], float).reshape(along))
    cost = np.where(held[0] * held[1] * held[2] <= max_voxels, read[0] * read[1] * read[2], np.inf)
    best = np.unravel_index(cost.argmin(), cost.shape)
    return tuple(own[i] for own, i in zip(sizes, best, strict=True)) if np.isfinite(cost[best]) else None


class _EnoughError(Exception):
    """Ends a forward pass at the layer that is being measured; what follows would be thrown away."""


def fix_statistics(
    network: Denoiser,
    read: Callable[[Tile], Tensor],
    tiles: Sequence[Tile],
    report: Report,
) -> float:
    """Give each instance norm of `network` the statistics of the whole volume, first layer to last.

    A layer's statistics need those of all earlier layers, hence one partial pass per layer; the features of one tile
    are in memory at a time. Returns the share of the whole work, the final pass included, that this took.

    Args:
        network: altered in place.
        read: gives a tile's input `(1, 1, D, H, W)`, halo included, on the network's device.
        tiles: of the whole volume.
        report: called with the share of the work that is done.
    """
    norms = [norm for norm in network.norms if isinstance(norm, nn.InstanceNorm3d)]
    if not norms:
        return 0.0
    # Time goes with the multiplications, and in narrow networks with the memory that is touched.
    layers = [conv.weight.numel() + 1500 * conv.out_channels for conv in (*network.widen, *network.narrow)]
    costs = list(itertools.accumulate(layers))  # of a pass that ends after each convolution
    total, done = sum(costs), 0.0
    for norm, cost in zip(norms, costs[:-1], strict=True):
        moments = Moments()
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])
            raise _EnoughError

        with norm.register_forward_pre_hook(stop):
            for part in tiles:
                with suppress(_EnoughError):
                    network(read(part))
                core = (slice(None), *part.core_in_read)
                features = seen.pop()[0][core]  # (channels, D, H, W)
                for plane in features.unbind(1):
                    moments.add(plane.permute(1, 2, 0).contiguous()[None])
                del features
                done += cost / total / len(tiles)
                report(done)
        device = next(network.parameters()).device
        norm.running_mean, norm.running_var = moments.mean.float().to(device), moments.variance.float().to(device)
        norm.track_running_stats = True  # in eval mode: use these instead of the input's own
    return done


def device_of(device: str | torch.device) -> torch.device:
    """The device by its name; `"auto"` is the GPU where there is one.

    Raises:
        ValueError: torch cannot use it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).device.type == "meta":  # it holds no numbers
            raise RuntimeError
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by its build
        raise ValueError(f"device: expected one that torch can use, got {str(device)!r}; use --device cpu") from error


def tile_size(
    tile: Sequence[int] | None, shape: tuple[int, ...], network: Denoiser, memory_gib: float
) -> tuple[int, ...]:
    """The tile that is asked for, or else the best whose features fit into `memory_gib`.

    Raises:
        ValueError: it is no tile, or none fits.
    """
    if tile is None:
        size = best_size(shape, network.receptive_radius, memory_gib * 2**30 / network.bytes_per_voxel)
        if size is None:
            raise ValueError(f"memory_gib: expected room for a tile, got {memory_gib:g} GiB; give more, or --tile")
        return size
    if len(tile) != 3 or any(n < 1 for n in tile):
        raise ValueError(f"tile: expected slices, rows and columns of at least 1, got {tuple(tile)}; e.g. 32 128 128")
    return tuple(int(n) for n in tile)


@contextmanager
def _memory_errors(device: torch.device, size: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # on a GPU torch.OutOfMemoryError, on the CPU one without a name of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"{device}: expected memory for tiles of {'x'.join(map(str, size))}, got too little; give a smaller --tile"
        ) from error


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """On a GPU, convolutions in float32: TF32 would let tiles differ from the whole by more than 1e-4."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
