"""The networks and filters that TOD-Net is compared with, where they differ from its own denoiser.

Each is written from its paper's description; none is the authors' code.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ThreeLayerCNN(nn.Module):
    """Three convolutions (9, 3 and 5 wide, ReLU between them), here in three dimensions with a thickness of 3 slices.

    Reference:
        Chen et al., Low-dose CT via convolutional neural network, Biomedical Optics Express 2017 (in 2-D; 64 and 32
        channels at width 64).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, (3, 9, 9), padding=(1, 4, 4)),
            nn.ReLU(),
            nn.Conv3d(width, max(1, width // 2), 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(max(1, width // 2), 1, (3, 5, 5), padding=(1, 2, 2)),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Restore `(N, 1, D, H, W)`."""
        return self.layers(image)


class SelfAttention3d(nn.Module):
    """Attention among the positions of each slice, and among the slices at each position, added to the features.

    Keys and values of the plane are averaged over a grid of at most `grid` x `grid` cells, so memory grows with the
    number of pixels and not with its square: the original attends to every pixel and is held to patches of 64 x 64.
    The factor of the sum starts at zero, as in the original.
    """

    def __init__(self, channels: int, grid: int = 8) -> None:
        super().__init__()
        self.query, self.key = (nn.Conv3d(channels, max(1, channels // 2), 1) for _ in range(2))
        self.value = nn.Conv3d(channels, channels, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, D, H, W)` to the same."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        return x + self.gamma * (self._plane(query, key, value) + self._depth(query, key, value))

    def _plane(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, channels, depth, height, width = value.shape
        cells = (min(self.grid, height), min(self.grid, width))
        flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # slices as a batch
        coarse = [F.adaptive_avg_pool2d(t, cells) for t in flat[1:]]
        q, k, v = (t.flatten(2).transpose(1, 2) for t in (flat[0], *coarse))
        seen = F.scaled_dot_product_attention(q, k, v)
        return seen.transpose(1, 2).reshape(n, depth, channels, height, width).transpose(1, 2)

    def _depth(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, channels, depth, height, width = value.shape
        q, k, v = (t.permute(0, 3, 4, 2, 1).flatten(0, 2) for t in (query, key, value))
        seen = F.scaled_dot_product_attention(q, k, v)
        return seen.reshape(n, height, width, depth, channels).permute(0, 4, 3, 1, 2)


class SelfAttentionDenoiser(nn.Module):
    """SA-WGAN's denoiser: 3x3x3 convolutions of 4w, 2w, w, 2w, 4w channels with self-attention after the inner three.

    Adds the input image to the output, as TOD-Net's denoiser does; the original does not say.

    Reference:
        Li et al., SACNN, IEEE Transactions on Medical Imaging 2020 (64, 32, 16, 32, 64 channels at width 16). This
        follows the abstract and the layer list of a port (guoyii/SACNN); the first author's own script
        (mmlipku/sacnn) trains a CNN with MSE alone, without adversary and autoencoder.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        channels = (1, 4 * width, 2 * width, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after), nn.ReLU()]
            if i in (1, 2, 3):
                layers.append(SelfAttention3d(after))
        self.layers = nn.Sequential(*layers, nn.Conv3d(channels[-1], 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Restore `(N, 1, D, H, W)`."""
        return image + self.layers(image)


class Autoencoder(nn.Module):
    """A slice autoencoder, trained to give normal-dose slices back; its code is SA-WGAN's perceptual space.

    Reference:
        Li et al., SACNN, 2020 (64, 128, 256 channels at width 64; here two convolutions are one).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def conv(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())

        self.encode = nn.Sequential(
            conv(1, width), nn.MaxPool2d(2), conv(width, 2 * width), nn.MaxPool2d(2), conv(2 * width, 4 * width)
        )
        self.decode = nn.Sequential(
            conv(4 * width, 2 * width),
            nn.Upsample(scale_factor=2),
            conv(2 * width, width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, slices: Tensor) -> Tensor:
        """`(N, 1, H, W)` to the same; H and W divide by 4."""
        return self.decode(self.encode(slices))


def critic_network(patch: tuple[int, int, int], channels: tuple[int, int, int], norm: str) -> nn.Module:
    """The paper's critic with another normalisation than batch norm: `"instance"`, or `"none"` as WGAN-GP wants."""
    if norm not in ("instance", "none"):
        raise ValueError(f"critic_norm: expected batch, instance or none, got {norm!r}; --set critic_norm=batch")
    layers: list[nn.Module] = []
    for before, after, stride in zip((1, *channels), channels, (2, 2, 1), strict=False):
        layers += [nn.Conv3d(before, after, 3, stride=stride, padding=1)]
        layers += [nn.InstanceNorm3d(after, affine=True)] if norm == "instance" else []
        layers += [nn.LeakyReLU(0.2)]
    features = channels[-1]
    for size in patch:
        features *= (size + 3) // 4 // 2
    return nn.Sequential(*layers, nn.AvgPool3d(2), nn.Flatten(), nn.Linear(features, 1))


def non_local_means(volume: Tensor, sigma: float) -> Tensor:
    """scikit-image's non-local means, slice by slice, on `(D, H, W)` in [0, 1].

    Reference:
        Buades et al., 2005; filter strength h = 0.8 sigma and patches as in scikit-image's example.
    """
    from skimage.restoration import denoise_nl_means

    slices = [
        denoise_nl_means(s, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True)
        for s in volume.numpy()
    ]
    return torch.from_numpy(np.stack(slices)).float()


def bm3d(volume: Tensor, sigma: float) -> Tensor:
    """BM3D, slice by slice, on `(D, H, W)` in [0, 1], from its authors' package.

    Raises:
        ValueError: the package is not installed (its licence allows non-commercial use only).
    """
    if find_spec("bm3d") is None:
        raise ValueError("bm3d: the package is not installed; pip install bm3d (non-commercial licence)")
    import bm3d as package

    return torch.from_numpy(np.stack([package.bm3d(s, sigma) for s in volume.numpy()])).float()
