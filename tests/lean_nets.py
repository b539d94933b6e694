"""What the tests of lean networks share: an autograd that keeps all beside one that does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from taskloss import Frozen
from taskloss import lean as lean_module


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch) -> None:
    """The tensors of these tests are smaller than what it is worth while for."""
    monkeypatch.setattr(lean_module, "_SMALL", 0)


def held(network: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """What ``run`` gives for x, and the bytes of activations that its graph holds: no weights, not x."""
    own = {t.untyped_storage().data_ptr() for t in (x, *network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(x), sum(kept.values())


def both(network: nn.Module, x: Tensor, **options) -> tuple[list[tuple[Tensor, Tensor, int]], Frozen]:
    """Value, gradient and bytes, with autograd's own layers and with lean ones."""
    found = []
    for lean in (False, True):
        frozen = Frozen(network, lean=lean, **options)
        leaf = x.clone().requires_grad_()
        y, n_bytes = held(frozen.network, leaf, frozen)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (gradient,) = torch.autograd.grad(y, leaf, weight)
        found.append((y.detach(), gradient, n_bytes))
    return found, frozen


def warmed(network: nn.Module) -> nn.Module:
    """Statistics and weights that are not the defaults."""
    for module in network.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 1)
                nn.init.uniform_(module.bias, -1, 1)
    return network


def odd(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise with what is awkward in it: zeros of both signs, a bound of ReLU6, tiny numbers."""
    x = torch.randn(shape, dtype=dtype)
    flat = x.view(-1)
    flat[:6] = torch.tensor([0.0, -0.0, 6.0, 1e-42, -1e-42, 0.4], dtype=dtype)
    return x


def network() -> nn.Sequential:
    return warmed(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.PReLU(),
            nn.ConvTranspose2d(4, 3, 2, stride=2),
        )
    )


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """At the input, left to autograd and lean."""
    found = []
    for on in (False, True):
        leaf = x.clone().requires_grad_()
        Frozen(net, lean=on)(leaf).square().sum().backward()
        found.append(leaf.grad)
    return found
