"""A lean network whose code, or whose caller, does as it likes: autograd's own result, whatever is done."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taskloss import Frozen, lean_layers
from tests.lean_nets import both, gradients, held, network, of_any_size  # noqa: F401


@pytest.mark.parametrize(
    "body",
    [
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.PReLU()),
    ],
    ids=["same-width", "wide", "convolution"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.skipif(not lean_layers.sees_hooks(), reason="this torch does not tell; it refuses what is not the same")
def test_a_part_that_the_network_checkpoints_itself_saves_the_same_twice(body: nn.Module, whole: bool) -> None:
    class Checkpoints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.end = body, nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.end(checkpoint(self.body, x, use_reentrant=False))

    net, x = Checkpoints(), torch.randn(3, 5, 4)
    expected, lean = gradients(net, x)
    assert torch.equal(expected, lean)
    leaf = x.clone().requires_grad_()
    Frozen(net, checkpoint=whole)(leaf).square().sum().backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_network_may_use_transforms_of_its_own() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.LeakyReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda t: self.body(t).sum())(x) + torch.func.jvp(self.body, (x,), (x,))[1].sum()

    assert torch.equal(*gradients(Inner(), torch.randn(3, 5, 4)))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU6(), nn.LeakyReLU(float("nan"))])
def test_a_batch_of_gradients_at_once(layer: nn.Module) -> None:
    found = []
    for on in (False, True):
        leaf = torch.linspace(-1, 7, 60).view(3, 5, 4).requires_grad_()
        y = Frozen(layer, lean=on)(leaf)
        several = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, 60).view(3, 5, 4)])
        found.append(torch.autograd.grad(y, leaf, several, is_grads_batched=True)[0])
    torch.testing.assert_close(*found, equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_functional_transforms_and_forward_mode_fall_back() -> None:
    frozen, x = Frozen(network()), torch.rand(2, 1, 8, 8)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(frozen(leaf).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda image: frozen(image).sum())(x), expected)
    each = torch.func.vmap(torch.func.grad(lambda image: frozen(image[None]).sum()))(x)
    torch.testing.assert_close(each, expected)
    _, along = torch.func.jvp(lambda image: frozen(image).sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum())


def test_a_part_that_is_compiled_stays_so() -> None:
    net = network()
    plain = Frozen(net, lean=False)
    net[0] = torch.compile(net[0], backend="eager", fullgraph=True)
    frozen, gradients = Frozen(net), []
    for term in (plain, frozen):
        leaf = torch.full((1, 1, 8, 8), 0.5).requires_grad_()
        gradients.append(torch.autograd.grad(term(leaf).sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_weights_that_others_train_still_get_their_gradient() -> None:
    own = nn.Parameter(torch.rand(4, 1, 3, 3))

    class Borrows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(x, own))

    frozen = Frozen(Borrows())
    frozen(torch.rand(1, 1, 8, 8).requires_grad_()).sum().backward()
    assert own.grad is not None and own.grad.any()
    assert frozen.made_lean == {"relu": 1}


def test_autocast() -> None:
    net, found = network(), []
    for lean in (False, True):
        frozen = Frozen(net, lean=lean)
        leaf = torch.full((2, 1, 16, 16), 0.5).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, n_bytes = held(frozen.network, leaf, frozen)
        found.append((y, torch.autograd.grad(y.float().square().sum(), leaf)[0], n_bytes))
    assert found[0][0].dtype is found[1][0].dtype is torch.bfloat16
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.05, atol=0.05)
    assert found[1][2] < 0.6 * found[0][2]
    assert frozen.made_lean["conv2d"] == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_the_caller(reentrant: bool) -> None:
    frozen, gradients = Frozen(network()), []
    for run in (frozen, lambda x: checkpoint(frozen, x, use_reentrant=reentrant)):
        leaf = torch.full((1, 1, 8, 8), 0.5).requires_grad_()
        run(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("overwrite", [
    lambda y: F.relu_(y[:, 1:3]), lambda y: F.relu6(y.transpose(1, 2)[:, ::2], inplace=True),
    lambda y: F.relu_(y.view(-1)), lambda y: F.leaky_relu_(y[..., 1:], 0.1), lambda y: F.hardtanh_(y[:1], -0.2, 0.3),
], ids=["channels", "strided", "flat", "leaky", "hardtanh"])  # fmt: skip
def test_an_in_place_change_is_seen_by_whoever_holds_the_tensor(overwrite) -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            held = y[:, :2]  # a view of what is overwritten
            overwrite(y)
            return y.square() + held.mean()

    net = Overwrites()
    (plain, lean), _ = both(net, torch.randn(2, 1, 8, 8))
    assert torch.equal(plain[0], lean[0])
    assert torch.equal(plain[1], lean[1])
    seconds = []
    for on in (False, True):
        leaf = torch.linspace(-1, 1, 128).view(2, 1, 8, 8).requires_grad_()
        (gradient,) = torch.autograd.grad(Frozen(net, lean=on)(leaf).sum(), leaf, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*seconds)


def test_hooks_and_subclasses_see_the_same() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net, seen = nn.Sequential(Scaled(1, 2, 3), nn.ReLU()), []
    net[0].register_forward_hook(lambda m, inputs, output: seen.append(output.detach().clone()))
    net[1].register_full_backward_hook(lambda m, into, out: seen.append(into[0].clone()))
    nn.utils.parametrizations.weight_norm(net[0])
    (plain, lean), _ = both(net, torch.randn(1, 1, 6, 6))
    assert torch.equal(plain[1], lean[1])
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_threads_do_not_disturb_each_other() -> None:
    frozen, found = Frozen(network()), {}
    x = torch.rand(8, 1, 8, 8)
    expected = []
    for sample in x:
        leaf = sample[None].clone().requires_grad_()
        expected.append(torch.autograd.grad(frozen(leaf).sum(), leaf)[0])

    def work(i: int) -> None:
        leaf = x[i : i + 1].clone().requires_grad_()
        found[i] = torch.autograd.grad(frozen(leaf).sum(), leaf)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_lean_too(clone) -> None:
    frozen = Frozen(network())
    leaf = torch.rand(1, 1, 8, 8).requires_grad_()
    y = frozen(leaf)
    twin = clone(frozen)
    assert torch.equal(twin(leaf), y)
    assert twin.made_lean == frozen.made_lean
