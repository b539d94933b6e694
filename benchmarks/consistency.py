"""``TaskConsistencyLoss`` on ImageNet networks beside MONAI, piq, lpips and pyiqa: same network, layers and distance.

Weights are random and shared by both sides: the networks' own would have to be downloaded, and time does not depend on
them. Both sides go forward from two images and backward to x_hat.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Target, agree, compare, without
from taskloss import TaskConsistencyLoss

SIZE, QUICK_SIZE = (2, 3, 128, 128), (1, 3, 64, 64)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Peer:
    """A peer as a function of two images, with the network that it is made of."""

    network: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]


Pair = tuple[Peer, TaskConsistencyLoss]


class Standardised(nn.Module):
    """Minus the mean, over the standard deviation, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class UnitDistance(nn.Module):
    """Squared distance of features of unit length in every pixel, weighted by channel and averaged over pixels."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", weight.detach().flatten())

    def forward(self, seen: Any, target: Any) -> Tensor:
        layers = zip(*((x,) if isinstance(x, Tensor) else x for x in (seen, target)), self.buffers(), strict=True)
        return sum(_distance(*layer) for layer in layers)


def run(options: Options) -> list[Case]:
    """One case per peer."""
    return [_case(name, build, options) for name, build in PEERS.items()]


def _case(name: str, build: Callable[[], Pair], options: Options) -> Case:
    torch.manual_seed(0)
    case = Case(f"beside {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers' own making
            peer, term = build()
    except ImportError as error:
        case.gaps.append(without(name.split(" ")[0], f"cannot be imported ({error})"))
        return case
    except (OSError, RuntimeError) as error:
        case.gaps.append(without(name.split(" ")[0], f"wants weights that cannot be had here ({error})"))
        return case
    to = {"device": options.device, "dtype": options.dtype}
    for module in (term, peer.network):
        module.to(**to)
    x, reference = torch.rand(2, *(QUICK_SIZE if options.quick else SIZE), **to)

    def side(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def step() -> tuple[Tensor, Tensor]:
            x_hat = x.clone().requires_grad_()
            value = compute(x_hat, reference).mean()
            return value.detach(), torch.autograd.grad(value, x_hat)[0]

        return step

    sides = {"taskloss": side(term), name: side(peer.call)}
    agree(case, f"taskloss and {name}", sides["taskloss"](), sides[name](), options.tolerance)
    case.targets = [
        Target("seconds", "taskloss", name, at_most=1.0),
        Target("peak_bytes", "taskloss", name, at_most=1.0),
    ]
    case.notes = [
        f"Images {' x '.join(map(str, x.shape))}, random weights shared by both sides.",
        "A peer that freezes its network and stops at the last layer runs the same convolutions as taskloss: then only "
        "the arithmetic around them can differ, and the distance is the benchmark's own.",
    ]
    return compare(case, sides, options)


def _lpips() -> Pair:
    from lpips import LPIPS

    peer = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return Peer(peer, peer), _lpips_as_term(peer)


def _pyiqa() -> Pair:
    from pyiqa.archs.lpips_arch import LPIPS

    # Its VGG and AlexNet insist on a download; its SqueezeNet does not.
    peer = LPIPS(net="squeeze", pnet_rand=True, pretrained=False).requires_grad_(False)
    return Peer(peer, lambda x_hat, reference: peer(x_hat, reference, normalize=False)), _lpips_as_term(peer)


def _lpips_as_term(peer: Any) -> TaskConsistencyLoss:
    scale = Standardised(peer.scaling_layer.shift.flatten().tolist(), peer.scaling_layer.scale.flatten().tolist())
    return TaskConsistencyLoss(peer.net, UnitDistance([lin.model[-1].weight for lin in peer.lins]), preprocess=scale)


def _piq() -> Pair:
    from piq import ContentLoss
    from torchvision.models.vgg import cfgs, make_layers

    network = make_layers(cfgs["D"])  # VGG-16 without its classifier
    layers = ("15",)  # relu3_3, piq's default
    term = TaskConsistencyLoss(
        network,
        lambda seen, target: (seen - target).square().mean((2, 3)).sum(1),
        layers=layers,
        preprocess=Standardised(IMAGENET_MEAN, IMAGENET_STD),
    )
    peer = ContentLoss(copy.deepcopy(network), layers=layers, weights=[1.0])
    return Peer(peer, peer), term


def _monai() -> Pair:
    from monai.losses import PerceptualLoss

    # Its VGG, AlexNet and SqueezeNet are lpips', and insist on a download.
    peer = PerceptualLoss(spatial_dims=2, network_type="resnet50", pretrained=False)
    trunk = peer.perceptual_function.model
    term = TaskConsistencyLoss(
        trunk,
        UnitDistance([torch.ones(2048)]),
        output=lambda features: next(iter(features.values())),
        preprocess=Standardised(IMAGENET_MEAN, IMAGENET_STD),
    )
    # It standardises both images in place: without copies the caller's own would change, and a leaf is refused.
    return Peer(peer, lambda x_hat, reference: peer(x_hat.clone(), reference.clone())), term


def _distance(seen: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    # The difference in one pass; a norm by its own function is ten times as slow over channels on a CPU.
    difference = torch.addcmul(target * _inverse_norm(target), seen, _inverse_norm(seen), value=-1)
    return difference.square().mean((2, 3)) @ weight


def _inverse_norm(features: Tensor) -> Tensor:
    return (features.square().sum(1, keepdim=True) + 1e-20).rsqrt()  # finite where features vanish, gradient and all


PEERS: dict[str, Callable[[], Pair]] = {
    "monai PerceptualLoss (ResNet-50)": _monai,
    "piq ContentLoss (VGG-16, relu3_3)": _piq,
    "lpips (VGG-16)": _lpips,
    "pyiqa LPIPS (SqueezeNet)": _pyiqa,
}
