"""A lean frozen network keeps less for the backward pass, and that is all that changes."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taskloss import Frozen, TaskConsistencyLoss, TaskOrientedLoss, lean_layers
from taskloss import lean as lean_module
from tests.ecosystem import CASES


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


BENT = 0.35 if lean_layers.sees_hooks() else 1  # see `lean._gelu`

LAYERS = {  # name: (the layer, the shape of its input, the share of autograd's bytes that it may hold)
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 17), 0),
    "conv2d": (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 9, 9), 0),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9), 0),
    "conv2d-reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 9, 9), 1),
    "conv2d-even-same": (nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 9, 9), 1),
    "conv3d": (nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)), (1, 2, 5, 6, 7), 0),
    "conv-transpose1d": (nn.ConvTranspose1d(4, 3, 2, stride=2), (2, 4, 9), 0),
    "conv-transpose2d": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5), 0),
    "conv-transpose3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 4, 5), 0),
    "batch-norm1d": (nn.BatchNorm1d(4), (3, 4, 7), 0),
    "batch-norm2d": (nn.BatchNorm2d(4), (2, 4, 8, 8), 0),
    "batch-norm3d-plain": (nn.BatchNorm3d(4, affine=False), (2, 4, 3, 5, 4), 0),
    "batch-norm-of-vectors": (nn.BatchNorm1d(4), (5, 4), 0),
    "batch-norm-of-the-batch": (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 8, 8), 1),
    "instance-norm": (nn.InstanceNorm2d(4, affine=True), (2, 4, 8, 8), 1),
    "instance-norm-running": (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 4, 8, 8), 0.05),
    "relu": (nn.ReLU(), (2, 3, 5, 7), 0.3),
    "relu-in-place": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)), (2, 3, 8, 8), 0.3),
    "leaky-relu": (nn.LeakyReLU(0.2), (2, 3, 8, 8), 0.3),
    "leaky-relu-in-place": (nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.1, inplace=True)), (2, 3, 8, 8), 0.3),
    "leaky-relu-negative": (nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(-0.2)), (2, 3, 8, 8), 1),
    "hardtanh-narrow": (nn.Sequential(nn.BatchNorm2d(3), nn.Hardtanh(0.1, 0.2)), (2, 3, 8, 8), 0.3),
    "prelu": (nn.Sequential(nn.BatchNorm2d(3), nn.PReLU()), (2, 3, 8, 8), 0.3),
    "prelu-negative": (nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(1, -0.3)), (2, 3, 8, 8), 0.3),
    "prelu-of-channels": (nn.Sequential(nn.BatchNorm3d(3), nn.PReLU(3, 0.3)), (2, 3, 4, 4, 4), 0.3),
    "relu6": (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(inplace=True)), (2, 3, 8, 8), 0.3),
    "hardtanh": (nn.Sequential(nn.BatchNorm2d(3), nn.Hardtanh(-0.6, 0.4)), (2, 3, 8, 8), 0.3),
    "max-pool2d": (nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2)), (2, 3, 8, 8), 0.05),
    "max-pool2d-overlapping": (nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(3, 2, 1)), (2, 3, 33, 33), 0.2),
    "max-pool3d": (nn.Sequential(nn.BatchNorm3d(3), nn.MaxPool3d(2, ceil_mode=True)), (2, 3, 7, 7, 7), 0.1),
    "avg-pool2d": (nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(3, 2, 1)), (2, 3, 8, 8), 0),
    "avg-pool3d": (nn.Sequential(nn.BatchNorm3d(3), nn.AvgPool3d(2)), (2, 3, 8, 8, 8), 0),
    "dropout": (nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.5)), (2, 3, 8, 8), 0),
    "gelu": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.GELU()), (2, 3, 8, 8), 0.5),
    "gelu-wide": (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), (2, 9, 8), BENT),
    "gelu-tanh": (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(approximate="tanh")), (2, 9, 8), BENT),
    "gelu-too-wide": (nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 512), nn.GELU()), (2, 5, 256), 1),
    "silu": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(inplace=True)), (2, 3, 8, 8), 0.5),
    "hardswish": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Hardswish()), (2, 3, 8, 8), 0.5),
    "elu": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ELU()), (2, 3, 8, 8), 0.5),
    "up-sampling": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2, mode="bilinear")), (2, 3, 8, 8), 0),
}


def odd(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise with what is awkward in it: zeros of both signs, a bound of ReLU6, tiny numbers."""
    x = torch.randn(shape, dtype=dtype)
    flat = x.view(-1)
    flat[:6] = torch.tensor([0.0, -0.0, 6.0, 1e-42, -1e-42, 0.4], dtype=dtype)
    return x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_less_and_gives_the_same_bits(name: str) -> None:
    layer, shape, share = LAYERS[name]
    ((y, gradient, n_bytes), (lean_y, lean_gradient, lean_bytes)), _ = both(warmed(layer), odd(shape))
    assert torch.equal(lean_y, y)
    assert torch.equal(lean_gradient, gradient)
    alone = name.split("-")[0] not in ("relu", "leaky") or "place" in name  # else autograd holds x itself, or y
    assert lean_bytes <= max(share * n_bytes, 0 if alone else y.numel() + 64), f"{lean_bytes:,} of {n_bytes:,} bytes"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [n for n in LAYERS if "2d" in n or n in ("relu", "prelu", "relu6")])
def test_channels_last_gives_the_same_bits(name: str) -> None:
    layer, shape, _ = LAYERS[name]
    x = odd(shape).contiguous(memory_format=torch.channels_last)
    (plain, lean), _ = both(warmed(layer).to(memory_format=torch.channels_last), x)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], lean[:2], strict=True))
    assert plain[1].stride() == lean[1].stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["conv2d", "conv-transpose3d", "batch-norm2d", "relu", "prelu", "leaky-relu", "relu6"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    layer, shape, _ = LAYERS[name]
    (plain, lean), _ = both(copy.deepcopy(layer).to(dtype), odd(shape, dtype))
    assert torch.equal(plain[0], lean[0])
    torch.testing.assert_close(plain[1], lean[1])


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


@pytest.mark.parametrize("name", [n for n in CASES if n != "hugging-face-logits"])
def test_networks_of_other_libraries_give_the_same_bits_and_hold_less(name: str) -> None:
    case = CASES[name]()
    x = case.x_hat if case.preprocess is None else case.preprocess(case.x_hat)
    found = []
    for lean in (False, True):
        term = Frozen(case.network, lean=lean)
        leaf = x.clone().requires_grad_()
        outputs, n_bytes = held(term.network, leaf, term)
        tensors = outputs.values() if isinstance(outputs, dict) else outputs
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        gradient = torch.autograd.grad([t.square().sum() for t in tensors], leaf)
        found.append(([t.detach() for t in tensors], gradient, n_bytes))
    (plain, plain_gradient, plain_bytes), (lean_, lean_gradient, lean_bytes) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, lean_, strict=True))
    assert torch.equal(plain_gradient[0], lean_gradient[0])
    assert lean_bytes < plain_bytes


class Looked(nn.Module):
    """Batch norm, somebody who looks at its output, and a rectifier in place."""

    def __init__(self, look: Callable[[Tensor], object], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.look, self.act = nn.BatchNorm2d(3), look, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        seen = self.look(y)
        y = self.act(y)
        return y if seen is None else y * seen


@pytest.mark.parametrize("look", [lambda y: None, lambda y: 2 * y, lambda y: y[:1].sin()], ids=["no", "copy", "view"])
@pytest.mark.parametrize(
    "act",
    [torch.relu_, lambda y: F.leaky_relu_(y, 0.2), lambda y: F.hardtanh_(y, -0.5, 0.25), lambda y: F.relu6(y, True)],
    ids=["relu", "leaky-relu", "hardtanh", "relu6"],
)
def test_a_rectifier_in_place_on_batch_norm_is_one_step(look, act) -> None:
    (plain, lean), _ = both(warmed(Looked(look, act)), odd((2, 3, 8, 8)))
    assert torch.equal(plain[0], lean[0])
    assert torch.equal(plain[1], lean[1])
    leaf = odd((2, 3, 8, 8)).requires_grad_()
    y = Frozen(Looked(lambda y: None, act))(leaf)
    assert type(y.grad_fn).__name__ == "NormaliseRectifyBackward"
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(Frozen(Looked(lambda y: None, act), lean=False)(leaf).square().sum(), leaf,
                                      create_graph=True)  # fmt: skip
    torch.testing.assert_close(
        torch.autograd.grad(gradient.sin().sum(), leaf), torch.autograd.grad(expected.sin().sum(), leaf)
    )


def test_dropout_between_batch_norm_and_a_rectifier_does_not_part_them() -> None:
    """As in MONAI's blocks, whose order is norm, dropout, activation."""
    for between, name in [(nn.Dropout3d(0.2), "NormaliseRectify"), (nn.Identity(), "NormaliseRectify"),
                          (nn.Tanh(), "Rectify")]:  # fmt: skip
        net = warmed(nn.Sequential(nn.BatchNorm3d(3), between, nn.ReLU(inplace=True)))
        (plain, lean), _ = both(net, odd((2, 3, 4, 8, 8)))
        assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1], lean[1])
        y = Frozen(net)(odd((2, 3, 4, 8, 8)).requires_grad_())
        assert type(y.grad_fn).__name__ == f"{name}Backward"


def test_small_tensors_are_left_to_autograd(monkeypatch) -> None:
    monkeypatch.undo()  # the size at which it is worth while
    frozen = Frozen(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(2, 2, 1)))
    frozen(torch.rand(1, 1, 192, 192).requires_grad_())
    assert frozen.made_lean == {"conv2d": 1, "max_pool2d": 1}, "the last convolution gets 4,608 values"


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


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """At the input, left to autograd and lean."""
    found = []
    for on in (False, True):
        leaf = x.clone().requires_grad_()
        Frozen(net, lean=on)(leaf).square().sum().backward()
        found.append(leaf.grad)
    return found


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


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU6(), nn.LeakyReLU(float("nan"))])
def test_a_batch_of_gradients_at_once(layer: nn.Module) -> None:
    found = []
    for on in (False, True):
        leaf = torch.linspace(-1, 7, 60).view(3, 5, 4).requires_grad_()
        y = Frozen(layer, lean=on)(leaf)
        several = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, 60).view(3, 5, 4)])
        found.append(torch.autograd.grad(y, leaf, several, is_grads_batched=True)[0])
    torch.testing.assert_close(*found, equal_nan=True, rtol=0, atol=0)


def test_attention_of_one_tensor_on_itself_is_autograds() -> None:
    """Its gradient is a sum, whose order makes the last bits."""

    class Itself(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.tanh()
            return F.scaled_dot_product_attention(y, 2 * y, y) + F.scaled_dot_product_attention(y.exp(), y, y)

    (plain, lean), frozen = both(Itself(), torch.randn(1, 2, 17, 4))
    assert torch.equal(plain[0], lean[0]) and torch.equal(plain[1], lean[1])
    assert frozen.made_lean == {}


def test_a_nan_passes_as_it_does_in_autograd() -> None:
    x = torch.tensor([[[float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0]]])
    for layer in (
        nn.ReLU(),
        nn.LeakyReLU(0.1),
        nn.Hardtanh(),
        nn.ReLU6(),
        nn.PReLU(),
        nn.PReLU(1, 0.0),
        nn.PReLU(1, -1.0),
    ):
        gradients = []
        for lean in (False, True):
            leaf = x.clone().requires_grad_()
            y = Frozen(layer, lean=lean)(leaf)
            weight = torch.tensor([[[1.0, float("nan"), float("inf"), float("nan"), -1.0, -3.0]]])
            gradients.append(torch.autograd.grad(y, leaf, weight)[0])
        assert torch.equal(gradients[0].view(torch.int32), gradients[1].view(torch.int32)), layer


# --- where it does not apply, autograd's own layers run --------------------------------------------------------------


def test_second_derivatives_are_autograds() -> None:
    net, x = network().double(), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    penalties = []
    for lean in (False, True):
        leaf = x.clone().requires_grad_()
        y = Frozen(net, lean=lean)(leaf).square().sum()
        (gradient,) = torch.autograd.grad(y, leaf, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.norm(), leaf)[0])
    assert penalties[0].any()
    torch.testing.assert_close(*penalties, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "conv-transpose2d", "batch-norm2d", "avg-pool2d", "prelu", "leaky-relu",
                                  "prelu-negative", "max-pool2d"])  # fmt: skip
def test_gradgradcheck_of_a_layer(name: str) -> None:
    layer, shape, _ = LAYERS[name]
    frozen = Frozen(copy.deepcopy(layer).double())
    x = torch.randn(1, *shape[1:2], *[min(s, 5) for s in shape[2:]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frozen, (x,))
    assert torch.autograd.gradgradcheck(frozen, (x,))
    assert frozen.made_lean


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


def test_it_is_said_and_can_be_turned_off() -> None:
    frozen = Frozen(network())
    assert "lean=True" in repr(frozen) and frozen.made_lean == {}
    frozen(torch.rand(1, 1, 8, 8))
    assert frozen.made_lean == {}, "without a graph there is nothing to keep"
    frozen(torch.rand(1, 1, 8, 8).requires_grad_())
    assert "lean=True (2 conv2d, 1 batch_norm, 1 relu, 1 max_pool2d, 1 prelu, 1 conv_transpose2d)" in repr(frozen)
    off = TaskOrientedLoss(frozen, F.cross_entropy, lean=False).task_model
    assert "lean=False" in repr(off)
    off(torch.rand(1, 1, 8, 8).requires_grad_())
    assert off.made_lean == {}
    assert not TaskConsistencyLoss(network(), nn.MSELoss(), lean=False).task_model.lean
