"""The four segmentation networks of the paper's section 3.2, at any width, and their checkpoint file.

All take `(N, 1, D, H, W)` in the units of `to_unit` and give logits `(N, K, D, H, W)` of background and the classes:
one organ in the paper (K = 2), or an organ and its tumours (K = 3). The paper says which families it used, not their
sizes; the published code's sizes are in `PUBLISHED_WIDTH`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import read_checkpoint, write_checkpoint
from .denoiser import unet

_FORMAT = "taskloss tod_net_ct task network 1"
SIDE_MULTIPLE = 16  # every side of a volume must divide by this, whatever the network
PUBLISHED_WIDTH = {"unet": 64, "vnet": 16, "res_unet": 16, "vox_resnet": 32}


def vnet(width: int = 16, n_scores: int = 2) -> nn.Module:
    """V-Net, built from MONAI's blocks: 5x5x5 convolutions, a residual per stage, three or (at the paper's width of
    16) four levels.

    Reference:
        Milletari et al., V-Net, 2016. MONAI adds batch norm and dropout, and ELU takes the place of PReLU.
    """
    from monai.networks.nets import VNet

    if width == PUBLISHED_WIDTH["vnet"]:
        return VNet(out_channels=n_scores)
    return _SmallVNet(width, n_scores)


class _SmallVNet(nn.Module):
    """Three levels for volumes of a few slices; dropout is left out, as a few channels cannot spare any."""

    def __init__(self, width: int, n_scores: int) -> None:
        super().__init__()
        from monai.networks.nets.vnet import DownTransition, InputTransition, OutputTransition, UpTransition

        act = ("elu", {"inplace": True})
        self.enter = InputTransition(3, 1, width, act)
        self.down = nn.ModuleList(DownTransition(3, width * 2**i, n, act) for i, n in enumerate((1, 2, 2)))
        self.up = nn.ModuleList(
            UpTransition(3, a * width, b * width, n, act, dropout_prob=(None, 0.0))
            for a, b, n in ((8, 8, 2), (8, 4, 1), (4, 2, 1))
        )
        self.leave = OutputTransition(3, 2 * width, n_scores, act)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image)
        skips = [x]
        for down in self.down:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.leave(x)


def res_unet(width: int = 16, n_scores: int = 2) -> nn.Module:
    """Res-U-Net: MONAI's U-Net with two residual units per level.

    Reference:
        Kerfoot et al., Left-Ventricle Quantification Using Residual U-Net, 2019. The published code of TOD-Net has
        another one (dilated convolutions, four supervised outputs, dropout that stays on in eval mode).
    """
    from monai.networks.nets import UNet

    channels, norm = (width, 2 * width, 4 * width, 8 * width), "batch"
    return UNet(
        3, 1, n_scores, channels, strides=(2, 2, 2), num_res_units=2, norm=norm, act=("prelu", {}), adn_ordering="NDA"
    )


class VoxResNet(nn.Module):
    """VoxResNet: residual volumetric stages with pre-activation, and four heads whose logits are summed.

    Stages halve the plane and keep the slices, as in the published code of TOD-Net; the original halves all axes and
    supervises each head (auxiliary losses, which neither TOD-Net's code nor this has).

    Reference:
        Chen et al., VoxResNet, NeuroImage 2018.
    """

    def __init__(self, width: int = 32, n_scores: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=1, bias=False),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm3d(before),
                nn.ReLU(),
                nn.Conv3d(before, 2 * width, 3, stride=(1, 2, 2), padding=1, bias=False),
                _VoxRes(2 * width),
                _VoxRes(2 * width),
            )
            for before in (width, 2 * width, 2 * width)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm3d(channels),
                nn.ReLU(),
                nn.ConvTranspose3d(channels, width, kernel_size=(1, k, k), stride=(1, k, k)),
                nn.ReLU(),
                nn.Conv3d(width, n_scores, 1),
            )
            for channels, k in ((width, 1), (2 * width, 2), (2 * width, 4), (2 * width, 8))
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        logits = self.heads[0](x)
        for stage, head in zip(self.stages, self.heads[1:], strict=True):
            x = stage(x)
            logits = logits + head(x)
        return logits


class _VoxRes(nn.Module):
    """Two pre-activated convolutions around an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm3d(channels), nn.ReLU(), nn.Conv3d(channels, channels, 3, padding=1, bias=False)]
        self.change = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


TASK_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "unet": unet,
    "vnet": vnet,
    "res_unet": res_unet,
    "vox_resnet": VoxResNet,
}


def build(name: str, width: int, n_scores: int = 2) -> nn.Module:
    """A new network by its name, with logits of background and `n_scores - 1` classes.

    Raises:
        ValueError: the name is unknown, or the width is less than 1.
    """
    if name not in TASK_NETWORKS:
        raise ValueError(f"task network: expected one of {', '.join(TASK_NETWORKS)}, got {name!r}")
    if width < 1:
        raise ValueError(f"task network: expected a width of at least 1, got {width}; for example --set task_width=8")
    return TASK_NETWORKS[name](width, n_scores)


def save_network(path: str | os.PathLike[str], network: nn.Module, name: str, width: int, **facts: Any) -> None:
    """Write a task network with what is needed to build it again; the file appears whole or not at all.

    `class_names` among the facts says what the classes above 0 are; without it there is one.
    """
    write_checkpoint(Path(path), _FORMAT, network, name=name, width=width, facts=facts)


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Read a task network from the file of `save_network`: on the CPU, in eval mode; `network.facts` is what it was
    saved with (its training voxel size among them).

    Raises:
        ValueError: the file is missing, damaged, a stranger's pickle, or of another architecture.
    """

    def build_again(content: Mapping[str, Any]) -> nn.Module:
        network = build(content["name"], content["width"], 1 + len(content["facts"].get("class_names", [""])))
        network.facts = content["facts"]
        return network

    source = "a weights.pt of the train-task stage"
    return read_checkpoint(Path(path), _FORMAT, "a task network's checkpoint", source, build_again)
