"""A checkpointed network is computed again piece by piece: less at the peak, and the same gradient."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Live
from taskloss import Frozen, LossSum, TaskConsistencyLoss, TaskOrientedLoss, gradient_maps

WIDTH, SIZE = 8, (1, 8, 16, 16)


class Block(nn.Module):
    """A residual block, smooth, so that lean layers keep as much as autograd does."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.inplace = nn.GroupNorm(2, WIDTH), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.tanh(self.norm(torch.sigmoid(self.a(x * 1)))))
        return y.add_(x) if self.inplace else torch.tanh(y) + x


class Net(nn.Module):
    """A row of blocks; with ``grow`` each result is added in place to what its block took in."""

    def __init__(self, grow: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(inplace) for _ in range(8))
        self.grow = grow

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grow:
                x = x * 1
                x += block(x)
            else:
                x = block(x)
        return x


def gradient(frozen: Frozen, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(frozen(x).square().sum(), x)[0]


def peak(frozen: Frozen, x: Tensor) -> int:
    gradient(frozen, x)
    x = x.clone().requires_grad_()
    with Live(x, *frozen.network.parameters()) as live:
        torch.autograd.grad(frozen(x).sum(), x)
    return live.peak


@pytest.mark.parametrize("lean", [False, True], ids=["stored", "lean"])
def test_the_peak_falls_and_the_gradient_stays_to_the_bit(lean) -> None:
    net, x = Net(), torch.rand(SIZE)
    whole, pieces = Frozen(net, lean=False), Frozen(net, lean=lean, checkpoint=True)
    for _ in range(2):
        assert torch.equal(gradient(pieces, x), gradient(whole, x))
    assert pieces.n_pieces == 7 and "checkpoint=True (7 pieces)" in repr(pieces), (
        "with one of them kept it is low enough"
    )
    assert peak(pieces, x) < 0.45 * peak(whole, x)


def test_what_would_not_lower_the_peak_is_not_computed_again() -> None:
    class Narrows(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[-1](nn.functional.avg_pool2d(super().forward(x), 4))

    net, x = Narrows(), torch.rand(SIZE)
    frozen = Frozen(net, checkpoint=True, lean=False)
    assert peak(frozen, x) < 0.5 * peak(Frozen(net, lean=False), x)
    assert "forward" not in vars(frozen.network.blocks[-1]), "the last block holds little, and is freed first"


def test_attention_in_a_piece_is_not_computed_a_third_time() -> None:
    class Attends(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).flatten(2)
            return nn.functional.scaled_dot_product_attention(y, 2 * y, y * 3).view_as(x)

    net, x = Net(), torch.rand(1, 8, 64, 64)
    net.blocks = nn.ModuleList(Attends() for _ in range(8))
    frozen = Frozen(net, checkpoint=True)
    assert torch.equal(gradient(frozen, x), gradient(Frozen(net, lean=False), x))
    assert frozen.n_pieces and frozen.made_lean["scaled_dot_product_attention"] == 8 - frozen.n_pieces


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "pickle"])
def test_a_copy_has_pieces_of_its_own(clone) -> None:
    x = torch.rand(SIZE)
    frozen = Frozen(Net(), checkpoint=True)
    expected = gradient(frozen, x)
    twin = clone(frozen)
    block = twin.network.blocks[0]
    assert block.forward.module is block is not frozen.network.blocks[0]
    assert torch.equal(gradient(twin, x), expected)
    again = Frozen(frozen)
    assert "forward" not in vars(again.network.blocks[0])


@pytest.mark.parametrize("how", [{"grow": True}, {"inplace": True}], ids=["outside", "inside"])
def test_what_is_overwritten_is_not_computed_again_from_it(how) -> None:
    net, x = Net(**how), torch.rand(SIZE)
    frozen = Frozen(net, checkpoint=True, lean=False)
    for _ in range(2):
        assert torch.equal(gradient(frozen, x), gradient(Frozen(net, lean=False), x))
    cut = ["forward" in vars(block) for block in frozen.network.blocks]
    assert sum(cut) == (0 if net.grow else 7)


def test_layers_maps_autocast_and_second_derivatives() -> None:
    net, x, reference = Net(), torch.rand(SIZE), torch.rand(SIZE)
    found = []
    for checkpoint in (False, True):
        one = Frozen(net, checkpoint=checkpoint)
        loss = LossSum(
            task=TaskOrientedLoss(one, nn.MSELoss()),
            seen=TaskConsistencyLoss(one, nn.MSELoss(), layers=["blocks.2.norm", "blocks.5"]),
            early=TaskConsistencyLoss(Frozen(one, checkpoint=checkpoint), nn.MSELoss(), layers=["blocks.2.norm"]),
        )
        maps = gradient_maps(loss, x, reference=reference, label=reference).maps
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        with torch.autocast("cpu", torch.bfloat16):
            half = gradient(one, x)
        found.append([*maps.values(), second, half])
        assert one.n_pieces == (7 if checkpoint else None)
    for stored, checkpointed in zip(*found, strict=True):
        assert torch.equal(stored, checkpointed)


def test_the_callers_own_network_is_not_cut() -> None:
    net = Net()
    frozen = Frozen(net, copy=False, checkpoint=True)
    gradient(frozen, torch.rand(SIZE))
    assert not any("forward" in vars(module) for module in net.modules()) and frozen.n_pieces is None


def test_a_network_that_keeps_what_it_computes_is_computed_as_a_whole() -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    x = torch.rand(SIZE)
    frozen = Frozen(Keeps(), checkpoint=True)
    gradient(frozen, x)
    assert frozen.n_pieces == 0
    assert getattr(frozen.network, "last", x).grad_fn is None


def test_a_network_in_pieces_compiles() -> None:
    x = torch.rand(SIZE)
    frozen = Frozen(Net(), checkpoint=True)
    expected = gradient(frozen, x)
    torch.compiler.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, expected)
