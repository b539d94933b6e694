"""A lean frozen network against the same network under autograd's own rules: what is held, the peak, and the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Live, Options, Target, agree, compare
from taskloss import Frozen

CLASSES = 2
FOLDED = "lean, fold=True"


@dataclass(frozen=True)
class Network:
    """A network of the page: how it is made, the input that it gets, and what is asked of it."""

    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    quick: tuple[int, ...]
    held: float  # lean over autograd, at most
    folded: float | None = None  # time with fold=True, over autograd, at most


def networks() -> dict[str, Network]:
    """Random weights: neither memory nor time depends on them."""
    import segmentation_models_pytorch as smp
    import timm
    from monai.networks import nets
    from torchvision import models

    volume, small = (1, 1, 32, 64, 64), (1, 1, 32, 32, 32)
    photo, tiny = (1, 3, 224, 224), (1, 3, 64, 64)
    photos = (4, 3, 224, 224)  # a batch: between its kernels the calls through Python weigh less
    features = (16, 16, 32, 64, 128, 16)
    return {
        "3-D U-Net, batch norm": Network(
            lambda: nets.BasicUNet(3, 1, CLASSES, features, act=("RELU", {"inplace": True}), norm="batch"),
            volume, small, 0.35, folded=0.9,
        ),
        "3-D U-Net, instance norm": Network(
            lambda: nets.BasicUNet(3, 1, CLASSES, features), volume, small, 0.6, folded=0.9
        ),
        "ResNet-18": Network(lambda: models.resnet18(), photo, tiny, 0.35),
        "ResNet-18, a batch": Network(lambda: models.resnet18(), photos, tiny, 0.35),
        "ResNet-50": Network(lambda: models.resnet50(), photo, tiny, 0.35),
        "smp U-Net": Network(lambda: smp.Unet("resnet18", encoder_weights=None, classes=CLASSES), photo, tiny, 0.35),
        "EfficientNet-Lite0": Network(lambda: timm.create_model("efficientnet_lite0"), photo, tiny, 0.35),
        "EfficientNet-Lite0, a batch": Network(lambda: timm.create_model("efficientnet_lite0"), photos, tiny, 0.35),
        "VGG-16 features": Network(lambda: models.vgg16().features, photo, tiny, 0.35),
        "ConvNeXt-T": Network(lambda: models.convnext_tiny(), photo, tiny, 0.75),
        "ViT-Ti/16": Network(lambda: timm.create_model("vit_tiny_patch16_224"), photo, photo, 0.9),
        "MONAI SegResNet": Network(lambda: nets.SegResNet(3, 8, 1, CLASSES), volume, small, 0.6, folded=0.9),
        "MONAI SwinUNETR": Network(
            lambda: nets.SwinUNETR(1, CLASSES, feature_size=12), (1, 1, 32, 64, 64), small, 0.9, folded=0.9
        ),
        "torchvision FCOS": Network(
            lambda: Detector(models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)),
            photo, tiny, 0.35,
        ),
    }  # fmt: skip


class Detector(nn.Module):
    """The raw maps of a detector's head, as one tensor: no boxes, whose number would depend on the weights."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.body, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(list(self.body(x).values()))
        return torch.cat([value.flatten(1) for value in maps.values()], 1)


def run(options: Options) -> list[Case]:
    """One case for each network."""
    return [of(name, network, options) for name, network in networks().items()]


def of(name: str, network: Network, options: Options) -> Case:
    """Value and gradient at the image: equal to the bit in float32 on a CPU, then bytes and time."""
    torch.manual_seed(0)
    to = {"device": options.device, "dtype": options.dtype}
    size = network.quick if options.quick else network.size
    module, x = network.build().eval().to(**to), torch.rand(size, **to)
    case = Case(f"{name}, {' x '.join(map(str, size))}")
    sides = {"lean": Frozen(module), "autograd": Frozen(module, lean=False)}
    if network.folded is not None:
        sides[FOLDED] = Frozen(module, fold=True)
    found = {side: passes(frozen, x) for side, frozen in sides.items()}
    exact = options.device.type == "cpu" and options.dtype is torch.float32
    agree(case, "lean and autograd", found["lean"](), found["autograd"](), 0.0 if exact else options.tolerance)
    if network.folded is not None:
        (folded, at_folded), (plain, at_plain) = found[FOLDED](), found["autograd"]()
        agree(case, "outputs, folded and autograd", folded, plain, max(1e-5, options.tolerance**2))
        case.values[f"{FOLDED}: relative L2 difference of the gradient"] = float(
            (at_folded - at_plain).norm() / at_plain.norm()
        )
        case.notes += [
            f"{FOLDED}: {sides[FOLDED].n_folded} batch norms in the convolutions before them, {sides[FOLDED].n_quick} "
            "3-D convolutions that may take oneDNN where PyTorch does not.",
            "It rounds otherwise, and where that takes a rectifier across zero the gradient jumps.",
        ]
    for side, frozen in sides.items():
        held, peak = memory(frozen, x)
        case.values[f"{side}: bytes held between forward and backward"] = held
        case.values[f"{side}: bytes of tensors at the peak"] = peak
    for what in ("bytes held between forward and backward", "bytes of tensors at the peak"):
        case.values[f"lean / autograd: {what}"] = case.values[f"lean: {what}"] / case.values[f"autograd: {what}"]
    case.targets = [
        Target("value", "lean / autograd: bytes held between forward and backward", at_most=network.held),
        Target("value", "lean / autograd: bytes of tensors at the peak", at_most=1.0),
        Target("seconds", "lean", "autograd", at_most=1.0),
    ]
    if network.folded is not None:
        case.targets.append(Target("seconds", FOLDED, "autograd", at_most=network.folded))
    made = ", ".join(f"{n} {function}" for function, n in sides["lean"].made_lean.items())
    case.notes.append(f"Lean: {made}.")
    return compare(case, found, options)


def passes(frozen: Frozen, x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward, and backward to the image."""

    def step() -> tuple[Tensor, Tensor]:
        x_hat = x.clone().requires_grad_()
        y = _picked(frozen(x_hat))
        return y.detach(), torch.autograd.grad(y, x_hat, torch.ones_like(y))[0]

    return step


def memory(frozen: Frozen, x: Tensor) -> tuple[int, int]:
    """Bytes of tensors that the graph keeps between forward and backward, and at the peak of both."""
    x_hat = x.clone().requires_grad_()
    with Live(x_hat, *frozen.network.parameters(), *frozen.network.buffers()) as live:
        y = _picked(frozen(x_hat))
        held = live.bytes() - y.untyped_storage().nbytes()  # the output is the caller's
        torch.autograd.grad(y, x_hat, torch.ones_like(y))
    return held, live.peak


def _picked(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]
