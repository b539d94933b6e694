"""The audit names every way in which a network would be a bad guide, and finds nothing wrong with a good one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import audit_task_model
from tests.properties import image, segmenter


class Wrap(nn.Module):
    """A named inner module between two convolutions."""

    def __init__(self, inner: nn.Module, after: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.inner = inner
        self.head = nn.Conv2d(3, 2, 1) if after else nn.Identity()

    def forward(self, x):
        return self.head(self.inner(self.stem(x)))


def make(function, **kwargs) -> nn.Module:
    class Inner(nn.Module):
        def forward(self, x):
            return function(x)

    return Wrap(Inner(), **kwargs)


def always_train_norm() -> nn.Module:
    class AlwaysTrain(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    return Wrap(AlwaysTrain(3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.head(self.scale(x))


CASES = {
    "functional dropout": (lambda: make(lambda x: F.dropout(x, 0.5)), {"random": "inner"}),
    "untracked batch norm": (
        lambda: Wrap(nn.BatchNorm2d(3, track_running_stats=False)),
        {"batch_statistics": "inner"},
    ),
    "batch norm that always trains": (always_train_norm, {"batch_statistics": "inner", "moving_state": "inner"}),
    "detach": (lambda: make(lambda x: x.detach()), {"blocked_gradient": "inner"}),
    "argmax": (lambda: make(lambda x: x.argmax(1).float(), after=False), {"blocked_gradient": "inner"}),
    "no_grad": (lambda: make(torch.no_grad()(lambda x: x * 2)), {"blocked_gradient": "inner"}),
    "rounding": (lambda: make(torch.round, after=False), {"zero_gradient": "Wrap"}),
    "in-place input": (InPlace, {"in_place": "scale"}),
    "tuple output": (lambda: make(lambda x: (x, x), after=False), {"output_type": "Wrap"}),
}


@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)
def test_finds(build, expected) -> None:
    findings = audit_task_model(build().eval(), image(channels=1, n=1))
    assert {f.kind: f.module for f in findings} == expected
    assert all(str(f).startswith(f.module + ": ") for f in findings)


def nan_net() -> nn.Module:
    net = make(lambda x: (x - x.mean((2, 3), keepdim=True)).square().sum((2, 3), keepdim=True).sqrt() + x)
    net.stem = nn.Conv2d(1, 3, 1)  # without padding a constant stays constant
    return net


def test_finds_the_module_whose_gradient_is_nan_on_a_constant_image() -> None:
    (finding,) = audit_task_model(nan_net(), image())
    assert (finding.kind, finding.module) == ("nan_gradient", "inner")
    assert "add a small epsilon" in finding.message


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_a_clean_network_gives_none(spatial_dims) -> None:
    assert audit_task_model(segmenter(spatial_dims).train(), image(spatial_dims, n=1)) == ()


def test_a_clean_u_net_gives_none() -> None:
    monai = pytest.importorskip("monai.networks.nets")
    net = monai.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="BATCH", dropout=0.1
    )
    assert audit_task_model(net, torch.rand(1, 1, 8, 8, 8)) == ()


def test_output_picks_the_tensor_first() -> None:
    net = make(lambda x: (x, x), after=False)
    assert audit_task_model(net, image(), output=lambda pair: pair[0]) == ()


def test_finds_an_input_in_the_wrong_range() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    for _ in range(50):
        net(image(n=8))
    net.eval()
    assert audit_task_model(net, image()) == ()
    (finding,) = audit_task_model(net, 255 * image())
    assert (finding.kind, finding.module) == ("input_range", "1")
    assert "is the example in the range that T was trained on?" in finding.message


def test_leaves_network_example_and_random_state_alone() -> None:
    net = segmenter().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = image()
    before, rng = x.clone(), torch.get_rng_state()
    audit_task_model(net, x)
    assert torch.equal(x, before) and x.grad is None and not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
