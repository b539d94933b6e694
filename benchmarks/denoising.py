"""`denoise_volume` beside MONAI's SlidingWindowInferer: the same network, time, memory, and distance from untiled."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.harness import Case, Options, Target, agree, compare, peak_bytes, process_peak_bytes, without
from examples.tod_net_ct.dose import WINDOW_HU, to_hu, to_unit
from examples.tod_net_ct.inference import (
    MEMORY_GB,
    PROGRAM_GB,
    cut,
    denoise_volume,
    far_outside,
    features_gib,
    tile_size,
)
from examples.tod_net_ct.networks import Denoiser

WIDTH = 4
TOLERANCE = 1e-4  # on the unit scale, where the window of 400 HU is 1
FEATURES_GIB = 6.2  # what `denoise` leaves to the features of 128 slices of 512 x 512 out of 8 GB
OVERLAP = 0.25  # MONAI's default
PAPER_WIDTH, CLINICAL = 32, (450, 512, 512)

Size = tuple[int, int, int]


def run(options: Options) -> list[Case]:
    """An eighth of the size in rounds, then the whole size once; in both MONAI reads 2.8 times the volume."""
    with torch.no_grad():
        if options.quick:
            return [_rounds((16, 48, 48), (4, 24, 24), 0.02, options, 1)]
        return [
            _rounds((64, 256, 256), (16, 128, 128), 1.5, options, 2),
            _once((128, 512, 512), (32, 256, 256), FEATURES_GIB, options),
            one_tile(CLINICAL, PAPER_WIDTH, options),
        ]


def _rounds(size: Size, roi: Size, memory_gib: float, options: Options, rounds: int) -> Case:
    network, volume_hu, sides, case = _start(size, roi, memory_gib, options)
    untiled = network(to_unit(volume_hu)[None, None].to(options.device))[0, 0].clamp(0, 1).cpu()
    inside = (volume_hu >= WINDOW_HU[0]) & (volume_hu <= WINDOW_HU[1])  # beyond, the input may come back as it was
    for name, side in sides.items():
        restored = to_unit(side())
        case.values[f"largest difference of {name} from untiled"] = float((restored - untiled)[inside].abs().max())
        if name == "ours":
            agree(case, "ours and untiled", restored[inside], untiled[inside], TOLERANCE)
    case.targets.append(Target("value", "largest difference of ours from untiled", at_most=TOLERANCE))
    return compare(case, sides, options, rounds=rounds)


def _once(size: Size, roi: Size, memory_gib: float, options: Options) -> Case:
    _, _, sides, case = _start(size, roi, memory_gib, options)
    case.notes.append("One turn of each side without a warm-up, since each takes minutes on a CPU.")
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    for name, side in sides.items():
        began = time.perf_counter()
        side()  # its result is on the CPU, so that nothing is still under way
        case.seconds[name] = [time.perf_counter() - began]
        if name == "ours":
            on_gpu = options.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(options.device) if on_gpu else process_peak_bytes()
            case.values["peak of the whole process in GB"] = peak / 1e9
            case.targets.append(Target("value", "peak of the whole process in GB", at_most=MEMORY_GB))
    return case


def one_tile(size: Size, width: int, options: Options) -> Case:
    """A whole scan at the paper's width, as `denoise --statistics tile --memory-gb 8` has it.

    A CPU takes long, so all but the largest tile is air, which is not computed; no other takes more memory.
    """
    torch.manual_seed(0)
    network, volume_hu = Denoiser(width).eval().to(options.device), torch.full(size, -1000.0)
    memory_gib = features_gib(MEMORY_GB, 2 * volume_hu.nbytes / 1e9, options.device)
    tiles = list(cut(size, tile_size(None, size, network, memory_gib), network.receptive_radius))
    read = [math.prod(s.stop - s.start for s in tile.read) for tile in tiles]
    volume_hu[tiles[read.index(max(read))].core] = 50.0
    case = Case(f"denoise {'x'.join(map(str, size))}, width {width}, tile statistics")

    seconds: list[float] = []

    def side() -> None:
        began = time.perf_counter()
        denoise_volume(network, volume_hu, device=options.device, statistics="tile", memory_gib=memory_gib)
        seconds.append(time.perf_counter() - began)

    peak = peak_bytes(side, options.device)
    minutes = min(seconds) / 60
    if peak < 0:
        case.gaps.append("the system does not tell the peak of one turn")
        return case
    case.values |= {
        "tiles": len(tiles),
        "minutes for one tile": minutes,
        "hours for all tiles, extrapolated": minutes / 60 * sum(read) / max(read),
        "peak of the whole process in GB": (peak + volume_hu.nbytes) / 1e9 + PROGRAM_GB,
    }
    case.targets.append(Target("value", "peak of the whole process in GB", at_most=MEMORY_GB))
    case.notes += [
        f"One of {len(tiles)} tiles is computed, the rest is air. The whole process: what the turn takes above what "
        f"was held, the volume, and {PROGRAM_GB:g} GB for Python, torch and the network.",
        f"The time is that of multiplications, {2 * sum(p.numel() for p in network.parameters()) / 1e6:.1f} MFLOP for "
        f"each voxel read, and each is read {sum(read) / math.prod(size):.1f} times. This wants a GPU.",
    ]
    return case


def _start(size: Size, roi: Size, memory_gib: float, options: Options) -> tuple[Denoiser, Tensor, dict, Case]:
    torch.manual_seed(0)
    network = Denoiser(WIDTH).eval().to(options.device)
    volume_hu = _body_hu(size)
    case = Case(f"denoise {'x'.join(map(str, size))}, width {WIDTH}")

    def ours() -> Tensor:
        return denoise_volume(network, volume_hu, device=options.device, memory_gib=memory_gib)

    sides = {"ours": ours}
    try:
        from monai.inferers import SlidingWindowInferer
    except ImportError:
        case.gaps.append(without("monai"))
        return network, volume_hu, sides, case
    inferer = SlidingWindowInferer(roi, sw_batch_size=4, overlap=OVERLAP, mode="gaussian", device="cpu")
    inferer.sw_device = options.device

    def monai() -> Tensor:
        restored = inferer(to_unit(volume_hu)[None, None], network)[0, 0]
        restored_hu = to_hu(restored.clamp(0, 1), WINDOW_HU)
        return torch.where(far_outside(volume_hu, WINDOW_HU), volume_hu, restored_hu)

    sides["MONAI"] = monai
    case.targets.append(Target("seconds", "MONAI", "ours", at_least=1.5))
    case.notes += [
        f"MONAI: windows of {'x'.join(map(str, roi))}, 4 a batch, overlap {OVERLAP}, Gaussian weights, no gradients. "
        "Its memory format is PyTorch's own, in which this network runs as fast as in channels_last_3d, since instance "
        "norm copies.",
        "MONAI normalises each window by itself, so its result is another one: see its difference from untiled.",
        f"Ours keeps features within {memory_gib:g} GiB and takes its statistics from the whole volume.",
    ]
    return network, volume_hu, sides, case


def _body_hu(size: Size) -> Tensor:
    """Noisy tissue, brighter towards the middle, in air."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    radius = (axes[1].square() + axes[2].square()).sqrt()
    noise_hu = 60 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    return torch.where(radius < 0.9, 80 * (1 - radius) + noise_hu, -1000.0)
