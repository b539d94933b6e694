"""What a network holds outside nn.Module's registry is frozen, digested and moved like the rest, and keeps no graph."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from taskloss import Frozen, InputError, TaskOrientedLoss
from taskloss.holdings import modules_of, plain_tensors_of
from tests.properties import cross_entropy, image, labels, segmenter


class Hider(nn.Module):
    """Layers in a list, a dict and a tuple, and tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)]
        self.heads = {"a": (nn.Conv2d(2, 2, 1),)}
        self.scale = torch.ones(2, 1, 1, requires_grad=True)
        self.shifts = [torch.zeros(1)]

    def forward(self, x):
        x = self.layers[1](self.layers[0](x))
        return self.heads["a"][0](x) * self.scale + self.shifts[0]


HIDDEN = {
    "module in a list": lambda net: net.layers[0].weight.data,
    "buffer in a list": lambda net: net.layers[1].running_mean,
    "module in a tuple in a dict": lambda net: net.heads["a"][0].bias.data,
    "tensor attribute": lambda net: net.scale.data,
    "tensor in a list": lambda net: net.shifts[0],
}


@pytest.mark.parametrize("pick", HIDDEN.values(), ids=HIDDEN)
def test_the_digest_sees_what_is_registered_nowhere(pick) -> None:
    frozen = Frozen(Hider())
    before = frozen.digest()
    pick(frozen.network).add_(1)
    assert frozen.digest() != before


class Scripted(nn.Module):
    """What TorchScript can hold beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 1)
        self.scale = torch.ones(2, 1, 1)
        self.shifts = [torch.zeros(1), torch.ones(1)]

    def forward(self, x):
        return self.layer(x) * self.scale + self.shifts[0]


@pytest.mark.parametrize("kind", ["script", "trace", "freeze"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_digest_sees_what_torchscript_holds(kind) -> None:
    makers = {
        "script": torch.jit.script,
        "trace": lambda net: torch.jit.trace(net, image()),
        "freeze": lambda net: torch.jit.freeze(torch.jit.script(net)),
    }
    net = Scripted().eval()
    digests = [Frozen(makers[kind](net)).digest() for _ in range(2)]
    net.scale.add_(1)
    other = Frozen(makers[kind](net))
    assert digests[0] == digests[1] != other.digest()
    assert not any(t.requires_grad for t in plain_tensors_of(other.network).values())
    x = image().requires_grad_()
    TaskOrientedLoss(other, cross_entropy)(x, labels(x)).backward()
    assert x.grad.any()


def test_what_is_registered_nowhere_is_frozen_and_the_callers_is_left() -> None:
    net = Hider()
    loss = TaskOrientedLoss(net, cross_entropy)
    x = image().requires_grad_()
    before = loss.task_model.digest()
    loss(x, labels(x)).backward()
    frozen = loss.task_model.network
    assert loss.task_model.digest() == before and x.grad.any()
    assert not any(m.training for _, m in modules_of(frozen))
    assert not any(t.requires_grad for t in (*plain_tensors_of(frozen).values(), *frozen.layers[0].parameters()))
    assert all(m.training for _, m in modules_of(net)) and net.scale.requires_grad and net.scale.grad is None


def test_a_shared_network_is_watched_where_nothing_is_registered() -> None:
    net = Hider()
    frozen = Frozen(net, copy=False)
    net.layers[1].train()
    with pytest.raises(InputError, match=r"the shared network's 'layers\[1\]' was switched to training mode"):
        frozen(image())
    net.layers[1].eval().requires_grad_(True)
    with pytest.raises(InputError, match=r"the shared network's 'layers\[1\].weight' requires a gradient again"):
        frozen(image())


def test_modules_in_lists_move_with_the_parent() -> None:
    parent = nn.ModuleList([Frozen(Hider())]).double()
    assert parent[0].network.layers[0].weight.dtype == parent[0].network.layers[1].running_var.dtype == torch.float64


# --- to_empty and the meta device ------------------------------------------------------------------------------------


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize("build", [segmenter, Hider, tied], ids=["segmenter", "hider", "tied"])
@pytest.mark.parametrize(
    "wipe",
    [
        lambda p: p.to_empty(device="cpu"),
        lambda p: p.to("meta").to_empty(device="cpu"),
        lambda p: p.to("meta").double().to_empty(device="cpu").float(),
        lambda p: copy.deepcopy(p.to("meta")).to_empty(device="cpu"),
    ],
    ids=["to_empty", "meta", "meta and cast", "copied on meta"],
)
def test_a_parent_that_is_emptied_leaves_the_task_network_its_values(build, wipe) -> None:
    parent = nn.ModuleDict({"denoiser": nn.Conv2d(1, 1, 1), "task": Frozen(build())})
    before = parent["task"].digest()
    after = wipe(parent)["task"]
    assert after.digest() == before
    assert not any(p.is_meta or p.requires_grad for _, m in modules_of(after.network) for p in m.parameters())


def test_a_loss_built_under_the_meta_device_keeps_the_networks_values() -> None:
    net = segmenter()
    with torch.device("meta"):
        parent = nn.ModuleDict({"denoiser": nn.Conv2d(1, 1, 1), "loss": TaskOrientedLoss(net, cross_entropy)})
    parent.to_empty(device="cpu")
    assert parent["loss"].task_model.digest() == Frozen(net).digest()


def test_a_network_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = segmenter()
    for empty in (net, nn.LazyLinear(2)):
        with pytest.raises(InputError, match=r"frozen: .* of the network has no values .* build it outside"):
            Frozen(empty)


# --- graphs ----------------------------------------------------------------------------------------------------------


class Keeper(nn.Module):
    """Keeps what it computed, as deep-supervision heads do: a list that was filled before, and a new attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.heads = [torch.rand(1)]
        self.last = None

    def forward(self, x):
        self.heads[0] = self.last = self.conv(x)
        return self.last


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
def test_a_network_that_keeps_its_outputs_keeps_no_graph(checkpoint) -> None:
    loss = TaskOrientedLoss(Keeper(), cross_entropy, checkpoint=checkpoint)
    before = loss.task_model.digest()
    for _ in range(2):
        x = image().requires_grad_()
        hat = 2 * x
        gone = weakref.ref(hat)
        loss(hat, labels(x)).backward()
        del hat
        gc.collect()
        assert gone() is None and x.grad.any()
    with torch.no_grad():
        loss(x, labels(x))
    assert loss.task_model.digest() == before
    twin = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(twin(x, labels(x) * 0), loss(x, labels(x) * 0))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("shared", [False, True], ids=["copied", "shared"])
def test_a_network_with_tensors_that_are_no_leaves_is_frozen(norm, shared) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated, and in many checkpoints
        net = nn.Sequential(norm(nn.Conv2d(1, 2, 3, padding=1)))
    net(image())
    assert net[0].weight.grad_fn is not None
    x = image().requires_grad_()
    expected = cross_entropy(net.eval()(x), labels(x) * 0)
    loss = TaskOrientedLoss(net, cross_entropy, copy=not shared)
    value = loss(x, labels(x) * 0)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])
    assert torch.equal(copy.deepcopy(loss)(x, labels(x) * 0), value)


def test_a_network_that_cannot_be_copied_says_what_to_do() -> None:
    net = segmenter()
    net.stream = (i for i in range(3))
    with pytest.raises(InputError, match=r"frozen: this Sequential cannot be copied \(.*\); pass copy=False to freeze"):
        Frozen(net)


# --- quantised networks ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_digest_sees_packed_weights() -> None:
    def quantised(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)

    assert Frozen(quantised(0)).digest() == Frozen(quantised(0)).digest() != Frozen(quantised(1)).digest()
