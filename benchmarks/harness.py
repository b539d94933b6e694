"""Side by side in one process: interleaved rounds, medians and quartiles of ratios, peak memory, and agreement first.

A benchmark is a module of this package with a ``run(options)`` that returns `Case`s. On CUDA time is taken by events
and memory by the allocator's peak; on a CPU by the clock and by the operating system.
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Side = Callable[[], Any]
_STATUS = Path("/proc/self/status")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's mallopt


@dataclass(frozen=True)
class Options:
    """What every benchmark is told.

    Attributes:
        device: Where it runs.
        dtype: Of images and networks.
        rounds: How often each side takes its turn, after one turn that does not count.
        quick: Small sizes and few rounds: does it run and agree? The tests' setting.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    rounds: int = 15
    quick: bool = False

    @property
    def tolerance(self) -> float:
        """The relative difference that the order of operations explains: half of the digits."""
        return float(torch.finfo(self.dtype).eps) ** 0.5


@dataclass(frozen=True)
class Target:
    """What a ratio of two sides is meant to be.

    Attributes:
        quantity: ``"seconds"`` or ``"peak_bytes"`` of a side, or ``"value"`` of a number that has no other side.
        ours: The side above the line.
        theirs: The side below the line; empty for a value.
        at_most: The bound, where smaller is better.
        at_least: The bound, where larger is better.
    """

    quantity: str
    ours: str
    theirs: str = ""
    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        above = self.at_least is None or ratio >= self.at_least
        return above and (self.at_most is None or ratio <= self.at_most)

    def verdict(self, middle: float, low: float, high: float) -> str:
        """``"yes"``, ``"within noise"`` where the median misses the bound but its interval reaches it, or ``"no"``."""
        if self.is_met(middle):
            return "yes"
        return "within noise" if self.is_met(low) or self.is_met(high) else "no"


@dataclass
class Case:
    """One comparison and all that was seen of it.

    Attributes:
        name: What was compared, with sizes: unique within its benchmark.
        seconds: By side, a sample for each round, in the order in which they were taken.
        peak_bytes: By side, memory at the peak of one turn above what was held before it.
        values: Numbers with a name and a unit that are no ratio of times, such as ``"GFLOP/s of T"``.
        agreement: By pair of sides, the largest relative difference of what they computed, and its tolerance.
        targets: What is asked of the ratios.
        gaps: Peers that are missing, each with the reason.
        notes: What a reader has to know, one sentence each.
        curve: For a scaling plot: the name of the axis, and for each side the points (x, median seconds).
    """

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, tuple[float, float]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    curve: dict[str, Any] = field(default_factory=dict)

    def ratio(self, target: Target) -> tuple[float, float, float]:
        """Median, and its interval, of what a target speaks of, round by round; a ratio of peaks has none."""
        if target.quantity == "value":
            found = self.values[target.ours]
            return found, found, found
        if target.quantity == "peak_bytes":
            found = self.peak_bytes[target.ours] / self.peak_bytes[target.theirs]
            return found, found, found
        return median([a / b for a, b in zip(self.seconds[target.ours], self.seconds[target.theirs], strict=True)])


def median(samples: Iterable[float]) -> tuple[float, float, float]:
    """The median, and an interval that covers the true one at least 95 times in 100, whatever the distribution.

    Below six samples no two of them do, and the interval is from the least to the largest.
    """
    ordered = sorted(samples)
    n = len(ordered)
    rank, below = 0, 0.5**n  # the chance that at most `rank` samples are below the true median
    while below + math.comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    return statistics.median(ordered), ordered[rank], ordered[n - 1 - rank]


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    ordered = sorted(samples)
    if len(ordered) == 1:
        return ordered[0], ordered[0], ordered[0]
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return middle, low, high


def compare(case: Case, sides: Mapping[str, Side], options: Options, *, rounds: int | None = None) -> Case:
    """Fill a case: every side's time in turns that alternate, then its peak memory.

    A side does the whole of its work when called, gradients included, and leaves nothing behind. The order of the
    sides turns by one each round, so that none is always the first. Meanwhile the C library keeps freed memory, as
    allocators for training do (jemalloc, tcmalloc): else it is chance which side pays for new pages.
    """
    names = list(sides)
    keep_freed_memory(True)
    for name in names:  # warm-up, and the longest turn tells whether fewer rounds must do
        _seconds(sides[name], options.device)
        case.seconds[name] = []
    n = rounds or (2 if options.quick else options.rounds)
    for turn in range(n):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            case.seconds[name].append(_seconds(sides[name], options.device))
    keep_freed_memory(False)
    for name in names:
        case.peak_bytes[name] = peak_bytes(sides[name], options.device)
    return case


def agree(case: Case, pair: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Assert that two sides computed the same, and keep how nearly: the largest difference over the largest value.

    Raises:
        AssertionError: they did not; a ratio of times would mean nothing.
    """
    worst = 0.0
    for a, b in zip(_tensors(ours), _tensors(theirs), strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"{case.name}, {pair}: expected equal shapes, got {a.shape} and {b.shape}")
        difference = float((a - b).abs().max()) / (float(b.abs().max()) or 1.0)
        worst = max(worst, difference) if math.isfinite(difference) else math.inf  # max(0, NaN) would be 0
    case.agreement[pair] = (worst, tolerance)
    if not worst <= tolerance:
        raise AssertionError(
            f"{case.name}, {pair}: expected a relative difference up to {tolerance:g}, got {worst:.3g}"
        )


def peak_bytes(side: Side, device: torch.device) -> int:
    """Memory at the peak of one turn, above what was held before it; -1 where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        side()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return -1
    libc = ctypes.CDLL(None)
    keep_freed_memory(False)
    began = time.perf_counter()
    side()
    n = 4 if time.perf_counter() - began < 1 else 1
    peaks = []
    for _ in range(n):  # the least of them: what else the process does can only add to it
        libc.malloc_trim(0)
        before = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        except OSError:
            return -1
        side()
        peaks.append(max(0, _status("VmHWM") - before))
    return min(peaks)


def keep_freed_memory(keep: bool) -> None:
    """Whether freed blocks stay with the process for reuse; if not, a peak is the system's to see (glibc only)."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1 if keep else 1 << 17)
        mallopt(_MMAP_THRESHOLD, 1 << (25 if keep else 16))
        mallopt(_MMAP_MAX, 0 if keep else 1 << 16)


class Live(TorchDispatchMode):
    """Sees every tensor that an operation makes, for as long as anything keeps it: exact to the byte, where the
    operating system counts pages. Hooks of saved tensors do not see what checkpointing keeps and computes again.

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary({t.untyped_storage(): None for t in known})
        self.storages: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                self.storages[tensor.untyped_storage()] = None
        self.peak = max(self.peak, self.bytes())
        return result


def process_peak_bytes() -> int:
    """The peak of this whole process, from the operating system."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def without(package: str, reason: str = "not installed") -> str:
    """A gap in words."""
    return f"{package}: {reason}; pip install 'taskloss[bench]'"


def _seconds(side: Side, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        side()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree.detach().double()]
    if isinstance(tree, Mapping):
        return [t for key in sorted(tree) for t in _tensors(tree[key])]
    if isinstance(tree, list | tuple):
        return [t for item in tree for t in _tensors(item)]
    if isinstance(tree, float | int):
        if not math.isfinite(tree):
            raise AssertionError(f"expected a finite number, got {tree}")
        return [torch.tensor(float(tree), dtype=torch.float64)]
    raise TypeError(f"expected tensors or numbers to compare, got {type(tree).__name__}")
