"""Folding puts batch norm into the convolution before it, only where nothing else can see the difference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Frozen, TaskConsistencyLoss, TaskOrientedLoss
from tests.lean_nets import network, warmed


class Block(nn.Module):
    """Two convolutions with their norms, called by the block's own code."""

    def __init__(self, *, branches: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4, affine=False)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.branches and float(x.detach().sum()) > 0:  # which no trace can follow
            y = y * 2
        return self.bn2(self.conv2(y)) + y


class Seen(Block):
    """The first convolution has another reader; the second is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.conv2(F.relu(self.bn1(y)) + y)
        return self.bn2(z) + self.conv2(y)


def difference(a: Frozen, b: Frozen, x: Tensor) -> float:
    """The largest of value and gradient, relative."""
    found = []
    for frozen in (a, b):
        leaf = x.clone().requires_grad_()
        y = frozen(leaf)
        found.append((y.detach(), torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).view(y.shape))[0]))
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
@pytest.mark.parametrize(
    ("build", "n"),
    [
        (Block, 2),
        (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(), Block().conv2), 1),
        (lambda: nn.Sequential(Block(branches=True), nn.Sequential(nn.Conv2d(4, 2, 1)), nn.BatchNorm2d(2)), 1),
        (Seen, 0),
        (lambda: Block(branches=True), 0),
    ],
    ids=["own-code", "nested", "not-traceable", "seen-by-others", "not-traceable-own-code"],
)
def test_values_and_gradients_are_equal_up_to_rounding(build, n: int, lean: bool) -> None:
    net = warmed(build()).eval()
    before = copy.deepcopy(net.state_dict())
    folded = Frozen(net, fold=True, lean=lean)
    assert folded.n_folded == n
    assert sum(isinstance(m, nn.Identity) for m in folded.network.modules()) == n
    assert difference(folded, Frozen(net, lean=lean), torch.randn(2, 3, 9, 9)) < (1e-5 if n else 1e-9)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "the caller's own"


def test_what_somebody_watches_or_computes_is_left() -> None:
    net = network()
    net[0].register_forward_hook(lambda module, inputs, output: output)
    assert Frozen(net, fold=True).n_folded == 0
    net = network()
    nn.utils.parametrizations.weight_norm(net[0])
    assert Frozen(net, fold=True).n_folded == 0
    net = network()
    assert Frozen(nn.Sequential(net[:2], net[0]), fold=True).n_folded == 0, "a convolution with two places"


def test_it_is_said_passed_on_and_refused_where_weights_are_shared() -> None:
    assert "fold=True (1 batch norms)" in repr(Frozen(network(), fold=True))
    assert "fold" not in repr(Frozen(network()))
    frozen = Frozen(network())
    assert TaskOrientedLoss(frozen, F.cross_entropy, fold=True).task_model.n_folded == 1
    shared = Frozen(network(), fold=True)
    assert TaskConsistencyLoss(shared, nn.MSELoss(), fold=True).task_model is shared
    assert TaskOrientedLoss(shared, F.cross_entropy).task_model is shared
    with pytest.raises(ValueError, match=r"fold=True changes weights, which copy=False shares; drop one of the two"):
        Frozen(network(), fold=True, copy=False)
