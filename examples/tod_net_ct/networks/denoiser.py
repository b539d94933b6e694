"""The paper's 3-D denoiser, its checkpoint file, and the U-Net of the example."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..dose import WINDOW_HU
from .checkpoint import read_checkpoint, write_checkpoint

UNET_SIDE_MULTIPLE = 8
_FORMAT = "taskloss tod_net_ct denoiser 1"
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm3d,
    "batch": nn.BatchNorm3d,
    "none": lambda channels: nn.Identity(),
}
_ACTIVATIONS = ("none", "tanh")


class Denoiser(nn.Module):
    """TOD-Net's denoiser: eight 3x3x3 convolutions at full resolution, channels 1-w-2w-4w-8w-4w-2w-w-1.

    The paper prints the kernels and the channels (its Fig. 1, w = 32); the rest is known from the authors' published
    code alone, and each such choice is an option here:

    - `norm="instance"` (as published; no affine, no running statistics) takes its statistics from whatever extent it
      is given, so a crop is not restored as the whole would be; `denoise_volume` tells how a tiled volume keeps them.
      `"batch"` and `"none"` do not depend on the extent once the network is in eval mode.
    - `residual=True` (as published) adds the input image to the output.
    - `final_activation="none"`. The published network ends in `"tanh"`, which cannot represent the identity: an
      input of 1 (200 HU) comes out at 0.76 at best unless the residual counteracts it, although a clean image must
      pass unchanged. Values outside [0, 1] are left to the caller: a clamp here would stop the gradient.

    Skips are added before the normalisation, and leaky ReLU has slope 0.2 (both as published).

    Args:
        width: channels of the first layer, w; 32 gives the paper's 2,324,865 parameters.
        norm: `"instance"`, `"batch"` or `"none"`.
        residual: whether the input is added to the output.
        final_activation: `"none"` or `"tanh"`.

    Shape:
        `(N, 1, D, H, W)` to the same, in the units of `to_unit`. Any D, H, W.

    Attributes:
        receptive_radius: voxels around an output voxel that it can depend on (beside the statistics): 8, one for
            each convolution.
        norms: the normalisations in the order in which they run.
        recompute: whether training keeps each block's input alone and computes the rest again in the backward pass,
            for less memory and one more forward pass of time. Batch norm would count each batch twice.
        facts: what its checkpoint file says of it (`window_hu`, training); empty for a new network.

    Raises:
        ValueError: an option is unknown, or the input is not `(N, 1, D, H, W)`.

    Reference:
        TOD-Net, section 2 and Fig. 1; DIAL-RPI/Task-Oriented-CT-Denoising_TOD-Net, `TOD_Net.py`.
    """

    receptive_radius = 8

    def __init__(
        self, width: int = 32, *, norm: str = "instance", residual: bool = True, final_activation: str = "none"
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Denoiser: expected a width of at least 1, got {width}; the paper's is width=32")
        if norm not in _NORMS:
            raise ValueError(f"Denoiser: expected norm in {sorted(_NORMS)}, got {norm!r}; the paper's is 'instance'")
        if final_activation not in _ACTIVATIONS:
            raise ValueError(
                f"Denoiser: expected final_activation in {sorted(_ACTIVATIONS)}, got {final_activation!r}; "
                "'none' can represent the identity"
            )
        self.config: dict[str, Any] = {
            "width": width,
            "norm": norm,
            "residual": residual,
            "final_activation": final_activation,
        }
        self.facts: dict[str, Any] = {}
        self.recompute = False
        up = (1, width, 2 * width, 4 * width, 8 * width)
        down = (*up[:0:-1], 1)
        self.widen = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1) for a, b in zip(up, up[1:], strict=False))
        self.narrow = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1) for a, b in zip(down, down[1:], strict=False))
        self.norms = nn.ModuleList(_NORMS[norm](channels) for channels in (*up[1:], *down[1:-1]))

    @property
    def bytes_per_voxel(self) -> int:
        """About what inference holds at its peak per voxel: three skips and the widest layer, at float32, with as
        much again for the convolution's working copies."""
        return 2 * 4 * (1 + 2 + 4 + 2 * 8) * int(self.config["width"])

    def forward(self, image: Tensor) -> Tensor:
        """Restore a batch of volumes."""
        if image.ndim != 5 or image.shape[1] != 1:
            raise ValueError(
                f"Denoiser: expected (N, 1, D, H, W), got {tuple(image.shape)}; add axes with volume[None, None]"
            )
        x = image
        skips = []
        for conv, norm in zip(self.widen, self.norms[:4], strict=True):
            x = self._block(conv, norm, x)
            skips.append(x)
        skips.pop()  # the deepest is the way on, not a skip
        for conv, norm in zip(self.narrow[:3], self.norms[4:], strict=True):
            x = self._block(conv, norm, x, skips.pop())
        x = self.narrow[3](x)
        if self.config["residual"]:
            x = x + image
        return torch.tanh(x) if self.config["final_activation"] == "tanh" else x

    def _block(self, conv: nn.Module, norm: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
        def compute(x: Tensor, skip: Tensor | None) -> Tensor:
            x = conv(x)
            return F.leaky_relu(norm(x if skip is None else x + skip), 0.2, inplace=True)

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, x, skip, use_reentrant=False)
        return compute(x, skip)


def unet(width: int = 16, n_scores: int = 2, *, norm: str = "batch") -> nn.Module:
    """MONAI's 3-D U-Net as the example's task network: 1 channel in, logits of background and each class out.

    Four levels (w, 2w, 4w, 8w) with strides of 2, so every side of the volume must divide by 8
    (`UNET_SIDE_MULTIPLE`); about 120 thousand parameters at width 8. The paper's own U-Net is far larger (42.9
    million) and returns probabilities.

    Raises:
        ValueError: the width is less than 1.
    """
    from monai.networks.nets import UNet

    if width < 1:
        raise ValueError(f"unet: expected a width of at least 1, got {width}; for example width=16")
    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=n_scores,
        channels=(width, 2 * width, 4 * width, 8 * width),
        strides=(2, 2, 2),
        num_res_units=0,
        norm=norm,
    )


def save_checkpoint(
    path: str | os.PathLike[str],
    network: Denoiser,
    *,
    window_hu: tuple[float, float] = WINDOW_HU,
    **facts: Any,
) -> Path:
    """Write a denoiser with its configuration and any facts about it; the file appears whole or not at all.

    Args:
        path: where; an existing file is replaced.
        network: the denoiser, on any device.
        window_hu: the HU window of its training images, which inference applies again.
        **facts: plain values to keep beside it (seed, epochs, scores): numbers, strings, None, and lists, tuples and
            dicts of these, because the file is never unpickled.

    Raises:
        ValueError: a fact is not a plain value.
    """
    path = Path(path)
    for name, value in facts.items():
        if not _is_plain(value):
            raise ValueError(
                f"save_checkpoint: expected plain values, got {name} of type {type(value).__name__}; "
                "convert it to numbers or text"
            )
    lower, upper = window_hu
    facts = {"window_hu": (float(lower), float(upper)), **facts}
    write_checkpoint(path, _FORMAT, network, config=dict(network.config), facts=facts)
    return path


def load_denoiser(path: str | os.PathLike[str]) -> Denoiser:
    """Read a denoiser from the file of `save_checkpoint`: on the CPU, in eval mode, with its `facts`.

    Nothing in the file is executed (`weights_only=True`).

    Raises:
        ValueError: the file is missing, truncated, a stranger's pickle, or of another architecture.
    """

    def build(content: Mapping[str, Any]) -> Denoiser:
        network = Denoiser(**content["config"])
        network.facts = {"window_hu": WINDOW_HU, **content["facts"]}
        return network

    return read_checkpoint(Path(path), _FORMAT, "a denoiser's checkpoint", "a file from save_checkpoint", build)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)  # exact types: a NumPy float is a float, too
