"""The laws that every term obeys, and small networks to try them on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def segmenter(spatial_dims: int = 2, classes: int = 2, channels: int = 1) -> nn.Sequential:
    """A small smooth network with batch norm and dropout, its running statistics not the defaults."""
    conv, norm = CONVS[spatial_dims], NORMS[spatial_dims]
    net = nn.Sequential(
        conv(channels, 4, 3, padding=1), norm(4), nn.Tanh(), nn.Dropout(0.5), conv(4, classes, 3, padding=1)
    )
    net[1].running_mean.uniform_(-0.5, 0.5)
    net[1].running_var.uniform_(0.5, 1.5)
    return net


def image(
    spatial_dims: int = 2, n: int = 2, channels: int = 1, size: int = 6, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.rand(n, channels, *(size,) * spatial_dims, dtype=dtype)


def labels(x: Tensor, classes: int = 2) -> Tensor:
    return torch.randint(0, classes, (x.shape[0], *x.shape[2:]))


def soft_dice(logits: Tensor, label: Tensor) -> Tensor:
    """Eq. 3 of the paper for two classes: 1 - Dice of the foreground, smoothed by one in both parts."""
    p = logits.softmax(1)[:, 1]
    g = label.to(p.dtype)
    return 1 - (1 + 2 * (p * g).sum()) / (1 + p.square().sum() + g.square().sum())


def by_hand(network: nn.Module, criterion, x: Tensor, label) -> tuple[Tensor, Tensor]:
    """The task loss and its gradient at x, written out without the library."""
    was_training = network.training
    network.eval()
    x = x.detach().clone().requires_grad_()
    value = criterion(network(x), label)
    (gradient,) = torch.autograd.grad(value, x)
    network.train(was_training)
    return value.detach(), gradient


def leaves_inputs_alone(call, *tensors: Tensor) -> None:
    """Values, versions, .grad and the random state are as they were."""
    before = [(t.clone(), t._version, t.grad, t.requires_grad) for t in tensors]
    rng = torch.get_rng_state()
    call()
    assert torch.equal(rng, torch.get_rng_state()), "the global random state moved"
    for tensor, (value, version, grad, requires_grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is grad
        assert tensor.requires_grad is requires_grad


cross_entropy = F.cross_entropy
