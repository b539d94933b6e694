"""What a lean network computes again instead of keeping it: attention's output and GELU's input."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Frozen, lean_layers
from tests.lean_nets import both, gradients, of_any_size  # noqa: F401


def test_attention_keeps_no_output_and_has_second_derivatives() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (x * torch.tensor([1.0, 0.5, 2.0])[:, None, None, None]).tanh().unsqueeze(1).unbind()
            return F.scaled_dot_product_attention(q, k, v, torch.rand(1, 1, 5, 5) * 0, scale=0.3)

    (plain, lean), frozen = both(Attention(), torch.randn(3, 2, 5, 4))
    assert frozen.made_lean == {"scaled_dot_product_attention": 1}
    assert torch.equal(plain[0], lean[0])
    assert torch.equal(plain[1], lean[1])
    assert lean[2] < plain[2]
    seconds = []
    for on in (False, True):
        x = torch.linspace(-1, 1, 120).view(3, 2, 5, 4).requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(Frozen(Attention(), lean=on)(x).square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize(
    ("network", "made"),
    [
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU()), {"gelu": 1}),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 8), nn.GELU(), nn.GELU()), {"gelu": 1}),
        (nn.Sequential(nn.Linear(4, 8), nn.GELU()), {}),
        (nn.Sequential(nn.Linear(4, 129), nn.LayerNorm(129), nn.Linear(129, 8), nn.GELU()), {}),
        (nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 8), nn.GELU()), {}),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(inplace=True), nn.GELU()), {"relu": 1}),
    ],
    ids=["once", "two-layers", "no-norm", "wide", "between", "overwritten"],
)
def test_gelu_is_given_its_input_again_where_a_norm_and_linear_layers_made_it(network: nn.Module, made: dict) -> None:
    (plain, lean), frozen = both(network, torch.randn(3, 5, 4))
    assert frozen.made_lean == made or not lean_layers.sees_hooks()
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1], lean[1])
    seconds = []
    for on in (False, True):
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(3, 5, 4).requires_grad_()
        y = Frozen(network, lean=on).double()(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


def test_gelu_of_something_else_keeps_its_own() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            other = x.tanh()
            z = self.norm(x)
            u = self.linear(other)  # not of z
            a = F.gelu(u)
            u = self.linear(self.norm(x))
            return a + F.gelu(z) + u

    (plain, lean), frozen = both(Crossed(), torch.randn(3, 5, 4))
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1], lean[1])
    assert frozen.made_lean == {}


def test_what_a_norm_read_and_somebody_overwrote_is_told_as_by_autograd() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = self.body(y)
            y.add_(1)
            return z + y.sum()

    for lean in (False, True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            Frozen(Overwrites(), lean=lean)(torch.rand(2, 4).requires_grad_()).sum().backward()


class Widens(nn.Module):
    """A layer norm, a linear layer and GELU, with something between them."""

    def __init__(self, between=lambda u: u, after=lambda net: None) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 8)
        self.register_buffer("shift", torch.zeros(8))
        self.between, self.after, self.wide = between, after, []

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        u = F.linear(input=z, weight=self.linear.weight) if self.between == "named" else self.linear(z)
        self.wide = [weakref.ref(z), weakref.ref(u)]
        if self.between == "buffer":
            u = F.linear(self.norm(x), self.linear.weight, self.shift)
        elif callable(self.between):
            self.between(u)
        y = F.gelu(u)
        self.after(self)
        return y


def unseen(u: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        u.mul_(2)


@pytest.mark.parametrize(
    ("between", "after"),
    [
        ("named", lambda net: None),
        (unseen, lambda net: None),
        (lambda u: u.data.mul_(2), lambda net: None),
        ("buffer", lambda net: net.shift.add_(1)),
    ],
    ids=["by-name", "written-unseen", "written-to-its-data", "a-buffer-as-bias"],
)
def test_gelu_after_code_that_does_as_it_likes(between, after) -> None:
    assert torch.equal(*gradients(Widens(between, after), torch.randn(3, 5, 4)))


@pytest.mark.skipif(not lean_layers.sees_hooks(), reason="GELU is left to autograd with this torch")
def test_what_makes_gelus_input_again_keeps_neither_it_nor_the_norms_result() -> None:
    net = Widens()
    frozen = Frozen(net)
    y = frozen(torch.randn(3, 5, 4).requires_grad_())
    assert frozen.made_lean == {"gelu": 1}
    assert [ref() for ref in frozen.network.wide] == [None, None]
    assert y.requires_grad


@pytest.mark.parametrize("layers", [["0", "2"], ["1", "2"]], ids=["norm", "linear"])
def test_second_derivatives_between_two_layers_go_through_gelus_input(layers: list[str]) -> None:
    net, seconds = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU()).double(), []
    for on in (False, True):
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(3, 5, 4).requires_grad_()
        inner, outer = Frozen(net, lean=on).features(x, layers).values()
        (gradient,) = torch.autograd.grad(outer.sum(), inner, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), (inner, x)))
    torch.testing.assert_close(*seconds)


def test_autocast_in_the_backward_pass_alone_changes_nothing() -> None:
    net, found = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU()), []
    for on in (False, True):
        leaf = torch.linspace(-1, 1, 60).view(3, 5, 4).requires_grad_()
        y = Frozen(net, lean=on)(leaf).sum()
        with torch.autocast("cpu", torch.bfloat16):
            y.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_the_meta_device() -> None:
    frozen = Frozen(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU())).to("meta")
    assert frozen(torch.empty(3, 5, 4, device="meta", requires_grad=True)).shape == (3, 5, 8)


def test_attention_of_one_tensor_on_itself_is_autograds() -> None:
    """Its gradient is a sum, whose order makes the last bits."""

    class Itself(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.tanh()
            return F.scaled_dot_product_attention(y, 2 * y, y) + F.scaled_dot_product_attention(y.exp(), y, y)

    (plain, lean), frozen = both(Itself(), torch.randn(1, 2, 17, 4))
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1], lean[1])
    assert frozen.made_lean == {}
