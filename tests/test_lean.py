"""A lean frozen network keeps less for the backward pass, and that is all that changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import Frozen, TaskConsistencyLoss, TaskOrientedLoss, lean_layers
from tests.ecosystem import CASES
from tests.lean_nets import both, held, network, odd, of_any_size, warmed  # noqa: F401

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
