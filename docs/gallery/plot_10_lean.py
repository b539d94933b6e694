"""
Lean: a frozen network without the memory of a trained one
==========================================================

Autograd keeps every layer's input to be able to train its weights. A frozen network's weights are never trained, so
most of that memory is kept for nobody. :class:`~taskloss.Frozen` leaves it out, and computes the same gradient.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from torchvision.models import resnet18

from taskloss import Frozen

torch.manual_seed(0)
unet_like = nn.Sequential(
    nn.Conv3d(1, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2),
    nn.Conv3d(16, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU(), nn.Upsample(scale_factor=2),
    nn.Conv3d(32, 2, 3, padding=1),
)  # fmt: skip
networks = {
    "3-D convolutions": (unet_like, torch.rand(1, 1, 16, 48, 48)),
    "ResNet-18": (resnet18(weights=None), torch.rand(1, 3, 128, 128)),
    "transformer": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False),
        torch.rand(4, 196, 64),
    ),
}


class Alive(TorchDispatchMode):
    """Sees every tensor that an operation makes, for as long as anything keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.storages[tensor.untyped_storage()] = None
        return result

    def bytes(self, *but: torch.Tensor) -> int:
        """What is kept now, without these tensors."""
        known = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(storage.nbytes() for storage in self.storages if storage._cdata not in known)


def held(network: nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes that wait for the backward pass, weights not counted, and the gradient that they give."""
    x = x.clone().requires_grad_()
    with Alive() as alive:
        y = network(x)
        waiting = alive.bytes(x, y, *network.network.parameters(), *network.network.buffers())
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return waiting, gradient


# %%
# The same gradient, bit for bit, from what is left.

rows = {}
for name, (network, x) in networks.items():
    stored, expected = held(Frozen(network, lean=False), x)
    lean, gradient = held(Frozen(network), x)
    rows[name] = (stored / 1e6, lean / 1e6)
    print(
        f"{name}: {stored / 1e6:.1f} MB, lean {lean / 1e6:.1f} MB, the same gradient: {torch.equal(expected, gradient)}"
    )

# %%
# What is left is what the gradient at the input needs: signs of ReLUs, places of maxima, statistics of norms.

figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
for row, (stored, lean) in enumerate(rows.values()):
    panel.barh(row + 0.2, 1, 0.38, color="0.7", label="autograd" if row == 0 else None)
    panel.barh(row - 0.2, lean / stored, 0.38, color="tab:blue", label="lean" if row == 0 else None)
    panel.text(lean / stored + 0.01, row - 0.2, f"{lean / stored:.2f}", va="center", fontsize=9)
panel.set_yticks(range(len(rows)), rows)
panel.invert_yaxis()
panel.set_xlabel("activations held between forward and backward")
panel.legend(fontsize=8)
