"""A denoiser over a whole volume layer by layer, a few slices at a time, with the statistics of the whole volume."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import Denoiser
from .moments import Moments

Fill = Callable[[Tensor], object]
"""Writes a layer's next slices into `(n, H, W, channels)`; each call goes on where the last one ended."""

SLABS = (4, 2, 1)  # slices at a time: thin slabs cost nothing, since no slice is computed twice
_LAST = 8
_SLOPE = 0.2


class Streams:
    """The layers of a denoiser with instance norm, over a volume whose features do not fit in memory.

    Slices stream through the layers: each convolution carries two slices of its input on to the next slab, so nothing
    is computed twice within a pass, and no halo at all. A layer's statistics need those of all earlier layers, hence
    one pass for each layer. The latest layer is kept for the passes to come if `kept_channels` has room for it, in the
    place of the one before: a pass reads ahead of what it writes. What is not kept is computed again, from the layer
    that is, or from the image. With room for every layer this takes the time of about 1.2 passes, without the widest
    1.5, and 4.7 with room for none.

    Args:
        network: in eval mode; not altered.
        read: gives slices of the image, `(n, H, W)` in [0, 1], on the network's device.
        shape: of the volume, `(D, H, W)`.
        kept_channels: of the widest layer to keep; 0 keeps none.
        slab: slices at a time.
    """

    def __init__(
        self,
        network: Denoiser,
        read: Callable[[slice], Tensor],
        shape: Sequence[int],
        kept_channels: int,
        slab: int = SLABS[0],
    ) -> None:
        self.read, self.config, self.slab, self.kept_channels = read, network.config, slab, kept_channels
        self.n_slices, *self.plane = shape
        self.convs: list[nn.Conv3d] = [*network.widen, *network.narrow]
        self.eps = [float(norm.eps) for norm in network.norms if isinstance(norm, nn.InstanceNorm3d)]
        self.scale_and_shift: list[tuple[Tensor, Tensor]] = []  # of each layer that is measured
        self.kept_layer = 0
        pixels = self.plane[0] * self.plane[1]
        self._kept = torch.empty(self.n_slices, kept_channels * pixels, device=self.convs[0].weight.device)

    def run(self, report: Callable[[float], object]) -> Iterator[tuple[slice, Tensor]]:
        """Measure layer after layer, then yield the restored image `(n, H, W)` with its slices, slab after slab."""
        costs, done = self._costs(), 0.0
        for layer, cost in enumerate(costs, start=1):
            moments, take = Moments(), self._raw(layer)
            for start in range(0, self.n_slices, self.slab):
                part = slice(start, min(start + self.slab, self.n_slices))
                features = take(part.stop - start)
                if layer == _LAST:
                    yield part, self._finish(features[..., 0], part)
                else:
                    moments.add(features)
                    if self._keeps(layer):
                        self._view(layer)[part] = features
                done += cost * (part.stop - start) / self.n_slices / sum(costs)
                report(done)
            if layer < _LAST:
                scale = (moments.variance + self.eps[layer - 1]).rsqrt()
                columns = (t.float().to(self._kept.device) for t in (scale, -moments.mean * scale))
                # Along a whole row: an operand of a few channels alone would make short loops.
                along_row, shift = (t.repeat(self.plane[1]) for t in columns)
                self.scale_and_shift.append((along_row, shift))
                if self._keeps(layer):
                    self.kept_layer = layer
            del take, features  # else the next pass's windows come on top of this one's

    def _raw(self, layer: int) -> Callable[[int], Tensor]:
        """A layer before its normalisation: gives its next n slices, `(n, H, W, channels)`."""
        take = self._convolve(self.convs[layer - 1], self._active(layer - 1))
        if not _LAST // 2 < layer < _LAST:
            return take
        fill_skip = self._active(_LAST - layer)

        def take_both(n: int) -> Tensor:
            features = take(n)
            skip = torch.empty_like(features)
            fill_skip(skip)
            return features.add_(skip)

        return take_both

    def _active(self, layer: int) -> Fill:
        """A layer after its normalisation and activation, or the image as layer 0."""
        at = itertools.count()

        def next_slices(n: int) -> slice:
            numbers = list(itertools.islice(at, n))
            return slice(numbers[0], numbers[-1] + 1)

        if layer == 0:
            return lambda out: out[..., 0].copy_(self.read(next_slices(len(out))))
        scale, shift = self.scale_and_shift[layer - 1]
        if layer == self.kept_layer:
            view = self._view(layer)
            take = lambda n: view[next_slices(n)]  # noqa: E731
        else:
            take = self._raw(layer)

        def fill(out: Tensor) -> None:
            rows = out.flatten(2)
            torch.addcmul(shift, take(len(out)).flatten(2), scale, out=rows)
            F.leaky_relu_(rows, _SLOPE)

        return fill

    def _convolve(self, conv: nn.Conv3d, fill: Fill) -> Callable[[int], Tensor]:
        """A convolution of slices that come one slab after the other; beyond the volume's ends are zeros."""
        weight = conv.weight.contiguous(memory_format=torch.channels_last_3d)
        window = torch.zeros(self.slab + 2, *self.plane, conv.in_channels, device=weight.device)
        done = 0

        def take(n: int) -> Tensor:
            nonlocal done
            first, last = 1 if done == 0 else 2, n + 1 if done + n == self.n_slices else n + 2
            for start in range(first, last, self.slab):  # the first time one slice more
                fill(window[start : min(start + self.slab, last)])
            window[last : n + 2] = 0
            features = _conv3d(window[: n + 2].permute(3, 0, 1, 2)[None], weight, conv.bias)
            window[:2] = window[n : n + 2].clone()
            done += n
            return features[0].permute(1, 2, 3, 0).contiguous()

        return take

    def _keeps(self, layer: int) -> bool:
        return layer < _LAST and self.convs[layer - 1].out_channels <= self.kept_channels

    def _view(self, layer: int) -> Tensor:
        """Where a layer is kept, `(D, H, W, channels)`: each slice at the beginning of its own room."""
        channels = self.convs[layer - 1].out_channels
        return self._kept[:, : channels * self.plane[0] * self.plane[1]].unflatten(1, (*self.plane, channels))

    def _finish(self, restored: Tensor, part: slice) -> Tensor:
        if self.config["residual"]:
            restored = restored + self.read(part)
        return torch.tanh(restored) if self.config["final_activation"] == "tanh" else restored

    def _costs(self) -> list[float]:
        """Of each pass, in multiplications: what `_raw` and `_active` will do."""
        kept = 0

        def raw(layer: int) -> float:
            skip = active(_LAST - layer) if _LAST // 2 < layer < _LAST else 0.0
            # In narrow layers time goes with the memory that is touched, rather than with the multiplications.
            own = self.convs[layer - 1].weight.numel() + 300 * self.convs[layer - 1].out_channels
            return own + active(layer - 1) + skip

        def active(layer: int) -> float:
            return 0.0 if layer in (0, kept) else raw(layer)

        costs = []
        for layer in range(1, _LAST + 1):
            costs.append(raw(layer))
            kept = layer if self._keeps(layer) else kept
        return costs


def room(network: Denoiser, shape: Sequence[int], memory_bytes: float) -> tuple[int, int] | None:
    """The widest layer to keep, in channels, and the slices at a time that fit.

    None where nothing fits, or where the network is no plain `Denoiser` with instance norm.
    """
    if type(network).forward is not Denoiser.forward or network.config["norm"] != "instance":
        return None
    width = int(network.config["width"])
    pixels = shape[1] * shape[2]
    for kept in (8 * width, 4 * width, 2 * width, width, 0):
        for slab in SLABS:
            # The windows of all convolutions where none is kept, and the widest layer twice.
            held = 4 * pixels * width * (26 * (slab + 2) + 16 * (slab + 1))
            if 4 * kept * shape[0] * pixels + held <= memory_bytes:
                return kept, slab
    return None


def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3x3 convolution, padded within the plane alone."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # F.conv3d takes oneDNN for large inputs alone, and for thin slabs a loop that is ten times slower.
        return torch.mkldnn_convolution(x, weight, bias, (0, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, padding=(0, 1, 1))
