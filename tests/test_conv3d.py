"""A folded network's 3-D convolutions take oneDNN where PyTorch would not and nowhere else, equal up to rounding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from taskloss import Frozen, conv3d

SMALL = (1, 2, 7, 9, 8)
LAYERS = {
    "same": nn.Conv3d(2, 3, 3, padding=1),
    "valid": nn.Conv3d(2, 3, 3, bias=False),
    "wide": nn.Conv3d(2, 4, 3, padding=2),
    "flat": nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 0)),
    "dilated": nn.Conv3d(2, 3, 3, padding=(2, 1, 2), dilation=(2, 1, 2)),
    "even": nn.Conv3d(2, 3, (2, 4, 2), padding=1),
    "one-channel": nn.Conv3d(2, 1, (5, 5, 3), padding=(2, 2, 1)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The sizes of what took the faster kernel, gradients included."""
    sizes: list[torch.Size] = []
    real = conv3d.aten.mkldnn_convolution

    def watched(x: Tensor, *rest: object) -> Tensor:
        sizes.append(x.shape)
        return real(x, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(conv3d, "aten", type("aten", (), {"mkldnn_convolution": staticmethod(watched)}))
    return sizes


def both(layer: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Value, gradient and a second derivative: plain in float64, and folded."""
    found = []
    for frozen, dtype in ((Frozen(layer, lean=False).double(), torch.float64), (Frozen(layer, fold=True), x.dtype)):
        leaf = x.to(dtype).requires_grad_()
        y = frozen(leaf)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        found.append((y.detach(), gradient.detach(), torch.autograd.grad(gradient.pow(2).sum(), leaf)[0]))
    return found


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d], ids=["plain", "channels-last"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_convolution(name: str, order: torch.memory_format, calls: list) -> None:
    exact, quick = both(LAYERS[name], torch.randn(SMALL).contiguous(memory_format=order))
    assert len(calls) >= 4, "forward, backward, and both again for the second derivative"
    for a, b in zip(exact, quick, strict=True):
        torch.testing.assert_close(b, a.float(), rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize(
    ("layer", "x", "takes"),
    [
        (nn.Conv3d(2, 3, 3), torch.rand(SMALL), True),
        (nn.Conv3d(2, 3, 3), torch.rand(2, *SMALL[1:]), False),
        (nn.Conv3d(2, 3, 3), torch.rand(SMALL[1:]), False),
        (nn.Conv3d(2, 2, 3), torch.rand(1, 2, 80, 128, 4), True),
        (nn.Conv3d(2, 3, 3), torch.rand(1, 2, 81, 128, 4), False),
        (nn.Conv3d(2, 3, 3).double(), torch.rand(SMALL).double(), False),
        (nn.Conv3d(2, 3, 3).bfloat16(), torch.rand(SMALL).bfloat16(), False),
        (nn.Conv3d(2, 3, 3, stride=2), torch.rand(SMALL), False),
        (nn.Conv3d(2, 4, 3, groups=2), torch.rand(SMALL), False),
        (nn.Conv3d(2, 3, 3, padding="same"), torch.rand(SMALL), False),
        (nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), torch.rand(SMALL), False),
        (nn.Conv3d(2, 3, 3, padding=3), torch.rand(SMALL), False),
        (nn.Conv3d(2, 3, 1), torch.rand(SMALL), False),
        (nn.Conv3d(2, 3, 5, padding=2), torch.rand(SMALL), False),
        (nn.Conv2d(2, 3, 3), torch.rand(1, 2, 9, 9), False),
    ],
    ids=["small", "batch", "no-batch", "largest", "larger", "float64", "bfloat16", "stride", "groups", "same", "mode",
         "padding-beyond-the-kernel", "pointwise", "large-kernel", "2d"],
)  # fmt: skip
def test_it_is_taken_where_pytorch_would_not(layer: nn.Module, x: Tensor, takes: bool, calls: list) -> None:
    y = Frozen(layer, fold=True)(x.requires_grad_())
    y.sum().backward()
    assert (len(calls) == 2) == takes == bool(calls)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_only_a_folded_network_has_it_and_the_callers_own_has_not(calls: list) -> None:
    layer, x = nn.Conv3d(2, 3, 3), torch.rand(SMALL)
    for frozen in (Frozen(layer), Frozen(layer, lean=False), layer):
        frozen(x)
    assert not calls
    folded = Frozen(layer, fold=True)
    assert type(layer) is nn.Conv3d and type(folded.network) is conv3d.QuickConv3d
    assert "fold=True (0 batch norms, 1 3-D convolutions)" in repr(folded)
    assert "3-D" not in repr(Frozen(nn.Conv2d(1, 1, 3), fold=True))
    assert "1 3-D" in repr(Frozen(folded.network)), "it is still in there"
    assert folded.digest() == Frozen(layer).digest()
    with torch.no_grad():
        folded(x)
    assert len(calls) == 1


def test_weights_that_are_trained_or_computed_and_subclasses_are_left() -> None:
    class Scaled(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    normed = nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 3))
    assert Frozen(nn.Sequential(Scaled(2, 2, 3), normed), fold=True).n_quick == 0
    layer = nn.Conv3d(2, 3, 3)
    conv3d.quicken_(layer)  # not frozen
    layer(torch.rand(SMALL)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_a_copy_takes_it_too(how, calls: list) -> None:
    how(Frozen(nn.Conv3d(2, 3, 3), fold=True))(torch.rand(SMALL))
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:TF32")
def test_under_transforms_autocast_and_tracers_it_is_pytorchs_own(calls: list) -> None:
    folded, x = Frozen(nn.Sequential(nn.Conv3d(2, 3, 3)), fold=True), torch.rand(SMALL)
    torch.func.vmap(folded)(x[None])
    torch.func.jvp(folded, (x,), (x,))
    torch.func.grad(lambda x: folded(x).sum())(x)
    with torch.autocast("cpu", torch.bfloat16):
        folded(x)
    torch.jit.trace(folded.network, x, check_trace=False)
    torch.fx.symbolic_trace(folded.network)(x)
    with torch.backends.mkldnn.flags(enabled=False):
        folded(x)
    assert not calls
    folded(x)
    assert len(calls) == 1


def test_the_order_in_memory_is_pytorchs() -> None:
    for order in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.rand(SMALL).contiguous(memory_format=order)
        outputs = [Frozen(nn.Conv3d(2, 3, 3), fold=fold)(x) for fold in (False, True)]
        assert outputs[0].stride() == outputs[1].stride()


def test_what_is_set_anew_counts(calls: list) -> None:
    folded = Frozen(nn.Sequential(nn.Conv3d(2, 3, 3)), fold=True)
    folded.network[0].stride = (2, 2, 2)
    assert folded(torch.rand(SMALL)).shape == (1, 3, 3, 4, 3)
    assert not calls


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients(how: str) -> None:
    layer, x = nn.Conv3d(2, 3, 3, padding=1), torch.rand(SMALL)
    found = []
    for fold in (False, True):
        leaf = x.clone().requires_grad_()
        y = Frozen(layer, fold=fold)(leaf)
        several = torch.stack([y.detach(), y.detach() ** 2])
        if how == "vmap":
            found.append(torch.vmap(lambda g: torch.autograd.grad(y, leaf, g, retain_graph=True)[0])(several))  # noqa: B023
        else:
            found.append(torch.autograd.grad(y, leaf, several, is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(1, 3, 9, 9, 9), (1, 2, 2, 9, 9)], ids=["channels", "too-small"])
def test_a_wrong_size_is_told_by_pytorch(shape: tuple[int, ...]) -> None:
    layer = nn.Conv3d(2, 3, 3)
    with pytest.raises(RuntimeError) as own:
        layer(torch.rand(shape))
    with pytest.raises(RuntimeError) as quick:
        Frozen(layer, fold=True)(torch.rand(shape))
    assert str(quick.value) == str(own.value)
