"""Task losses that compute their network again instead of keeping what it held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from taskloss import (
    TaskConsistencyLoss,
    TaskOrientedLoss,
)
from tests.properties import segmenter, soft_dice
from tests.scenes import x_reference_label


class UNet3d(nn.Module):
    """Two levels of a 3-D U-Net, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*self._block(1, 8), *self._block(8, 8))
        self.bottom = nn.Sequential(nn.MaxPool3d(2), *self._block(8, 16), nn.Dropout3d(0.5), *self._block(16, 16))
        self.up = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.head = nn.Sequential(*self._block(16, 8), nn.Conv3d(8, 2, 1))

    @staticmethod
    def _block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.bottom(skip))], 1))


def bytes_saved(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A value, and the bytes that its graph keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = compute()
    return value, sum(kept.values())


@pytest.mark.parametrize("kind", ["task", "consistency", "consistency-at-layers"])
def test_checkpointing_a_3d_unet_keeps_fewer_bytes_and_the_same_gradient(kind: str) -> None:
    net = UNet3d()
    reference, label = torch.rand(1, 1, 16, 16, 16), torch.randint(0, 2, (1, 16, 16, 16))
    layers = ["down", "bottom"] if kind.endswith("layers") else None
    gradients, kept = [], []
    for checkpoint in (False, True):
        if kind == "task":
            term, target = TaskOrientedLoss(net, soft_dice, checkpoint=checkpoint, lean=False), label
        else:
            term = TaskConsistencyLoss(net, nn.MSELoss(), layers=layers, checkpoint=checkpoint, lean=False)
            target = reference
        x = torch.full((1, 1, 16, 16, 16), 0.5).requires_grad_()
        rng = torch.get_rng_state()
        value, n_bytes = bytes_saved(lambda term=term, x=x, target=target: term(x, target))
        value.backward()
        assert torch.equal(rng, torch.get_rng_state())
        gradients.append(x.grad)
        kept.append(n_bytes)
    assert torch.equal(*gradients)
    share = 1 / 2 if layers else 2 / 5  # what the pieces take in; the distance keeps the named layers themselves
    assert kept[1] < share * kept[0], f"{kept[1]:,} against {kept[0]:,} bytes"


def test_checkpointing_works_under_autocast() -> None:
    net, (x, _, label) = segmenter(), x_reference_label()
    gradients = []
    for checkpoint in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = TaskOrientedLoss(net, soft_dice, checkpoint=checkpoint)(leaf, label)
        value.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
