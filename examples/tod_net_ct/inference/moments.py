"""Mean and variance of features that are seen part by part."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and variance of each channel, over parts that come one after the other.

    Attributes:
        count: Voxels seen.
        mean: `(channels,)`, float64 on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """See one more part, `(n, H, W, channels)` and best dense in this order.

        One slice at a time: sums stay short and no large copy is made. It is several times as fast as torch.var_mean,
        which has no vectorised loop, and as exact: the squares are of differences from the slice's own mean.
        """
        for plane in features:
            rows, channels = plane.flatten(1), plane.shape[-1]
            n = rows.numel() // channels
            mean = rows.mean(0).double().unflatten(0, (-1, channels)).mean(0)
            centred = rows - mean.float().repeat(len(rows[0]) // channels)
            squares = centred.square_().sum(0).double().unflatten(0, (-1, channels)).sum(0).cpu()
            step = mean.cpu() - self.mean  # Chan, Golub and LeVeque's update: no large sums to cancel
            self.mean = self.mean + step * (n / (self.count + n))
            self._squares = self._squares + squares + step.square() * (self.count * n / (self.count + n))
            self.count += n

    @property
    def variance(self) -> Tensor:
        """Over all voxels, not their number less one: as instance norm takes it."""
        return self._squares / self.count
