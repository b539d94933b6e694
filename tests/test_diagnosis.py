"""The first mistakes of a new user get one sentence that says what to type."""

import builtins
import sys

import pytest
import torch
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    Frozen,
    GradientBalancer,
    InputError,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    WassersteinCritic,
    WeightClipping,
    gradient_maps,
    plot_gradient_maps,
)
from tests.properties import cross_entropy, image, labels, segmenter

CLASSES = {
    "task_criterion": (
        lambda: TaskOrientedLoss(segmenter(), nn.CrossEntropyLoss),
        r"^task_oriented_loss: task_criterion must be callable as criterion\(prediction, label\), "
        r"got the class CrossEntropyLoss itself; make one of it: CrossEntropyLoss\(\)$",
    ),
    "criterion": (lambda: Fidelity(nn.MSELoss), r"^fidelity: .* the class MSELoss itself; make one of it: MSELoss\(\)"),
    "distance": (
        lambda: TaskConsistencyLoss(segmenter(), nn.L1Loss),
        r"^task_consistency_loss: distance must .* the class L1Loss itself; make one of it: L1Loss\(\)",
    ),
    "distance that is none": (
        lambda: TaskConsistencyLoss(segmenter(), 2),
        r"^task_consistency_loss: distance must be callable as distance\(prediction, target\), got int",
    ),
    "network": (
        lambda: TaskOrientedLoss(nn.Identity, cross_entropy),
        r"expected an nn.Module, got the class Identity itself; make one of it: Identity\(...\)",
    ),
    "function as network": (
        lambda: TaskOrientedLoss(lambda x: x, cross_entropy),
        "expected an nn.Module, got function; wrap the function in an nn.Module",
    ),
    "name as network": (
        lambda: TaskOrientedLoss("resnet18", cross_entropy),
        "expected an nn.Module, got str; give the network itself",
    ),
    "preprocess that is none": (
        lambda: TaskOrientedLoss(segmenter(), cross_entropy, preprocess=3),
        r"task_oriented_loss: preprocess must be callable as preprocess\(x\), got int",
    ),
    "preprocess class": (
        lambda: Fidelity(nn.MSELoss(), preprocess=nn.ReLU),
        r"fidelity: preprocess must .* got the class ReLU itself; make one of it: ReLU\(\)",
    ),
    "output by name": (
        lambda: TaskOrientedLoss(segmenter(), cross_entropy, output="logits"),
        r"task_oriented_loss: output must be callable as output\(what the network returns\), got str",
    ),
    "output of a feature net": (
        lambda: TaskConsistencyLoss(segmenter(), nn.MSELoss(), output=0),
        "task_consistency_loss: output must be callable .*, got int",
    ),
    "function as frozen": (lambda: Frozen(torch.relu), "expected an nn.Module, got builtin_function_or_method; wrap"),
    "aggregator by name": (
        lambda: GradientBalancer(LossSum(mse=Fidelity(nn.MSELoss())), aggregator="UPGrad"),
        r"gradient_balancer: aggregator must be callable .* torchjd.aggregation.UPGrad\(\), got str",
    ),
    "aggregator class": (
        lambda: GradientBalancer(LossSum(mse=Fidelity(nn.MSELoss())), aggregator=nn.Identity),
        r"gradient_balancer: aggregator must .* got the class Identity itself; make one of it: Identity\(\)",
    ),
    "constraint class": (
        lambda: WassersteinCritic(patch_size=(8, 8), spatial_dims=2, constraint=WeightClipping),
        r"wasserstein_critic: constraint .* the class WeightClipping itself; make one of it: WeightClipping\(\)",
    ),
    "critic network class": (
        lambda: WassersteinCritic(network=nn.Flatten),
        r"wasserstein_critic: network must be an nn.Module, got the class Flatten itself",
    ),
    "critic network function": (
        lambda: WassersteinCritic(network=lambda x: x),
        "wasserstein_critic: network must be an nn.Module, got function; wrap the function in an nn.Module",
    ),
    "critic class": (
        lambda: AdversarialLoss(WassersteinCritic),
        r"adversarial_loss: .* the class WassersteinCritic itself; make one of it: WassersteinCritic\(\)",
    ),
}


@pytest.mark.parametrize(("act", "sentence"), CLASSES.values(), ids=CLASSES)
def test_the_wrong_kind_of_argument(act, sentence) -> None:
    with pytest.raises(TypeError, match=sentence):
        act()


def rgb_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1))


def flat_critic(**kwargs) -> WassersteinCritic:
    return WassersteinCritic(network=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 1)), **kwargs)


IMAGES = {
    "one channel for three": (
        lambda x: TaskOrientedLoss(rgb_net(), cross_entropy)(x, labels(x)),
        r"^task_oriented_loss: x_hat \(2, 1, 6, 6\) has 1 channels but the task network takes 3; "
        r"pass preprocess=lambda x: x.expand\(-1, 3, -1, -1\)$",
    ),
    "two channels for three": (
        lambda x: TaskOrientedLoss(rgb_net(), cross_entropy)(x.expand(-1, 2, -1, -1), labels(x)),
        r"x_hat \(2, 2, 6, 6\) has 2 channels but the task network takes 3; pass preprocess=",
    ),
    "one channel for three in a volume": (
        lambda x: TaskOrientedLoss(nn.Conv3d(3, 2, 1), cross_entropy)(x[..., None], labels(x)[..., None]),
        r"pass preprocess=lambda x: x.expand\(-1, 3, -1, -1, -1\)",
    ),
    "channels of a feature net": (
        lambda x: TaskConsistencyLoss(rgb_net(), nn.MSELoss(), layers=["0"])(x, x),
        r"^task_consistency_loss: x_hat \(2, 1, 6, 6\) has 1 channels but the task network takes 3; pass preprocess=",
    ),
    "unbatched image and label": (
        lambda x: TaskOrientedLoss(segmenter(), cross_entropy)(x[0], labels(x)[0]),
        r"^task_oriented_loss: x_hat \(1, 6, 6\) and label \(6, 6\) have no batch axis; "
        r"call loss\(x_hat\[None\], label\[None\]\)",
    ),
    "unbatched image": (
        lambda x: TaskOrientedLoss(segmenter(), cross_entropy)(x[0], labels(x)[:1]),
        r"^task_oriented_loss: x_hat \(1, 6, 6\) has 3 axes but the first layer of the task network is a Conv2d, "
        r"which takes 4; add the batch axis with x_hat\[None\]",
    ),
    "unbatched image without norms": (
        lambda x: TaskOrientedLoss(nn.Conv2d(1, 2, 1), cross_entropy)(x[0], labels(x)[:1]),
        r"x_hat \(1, 6, 6\) has 3 axes .* add the batch axis with x_hat\[None\]",
    ),
    "image for a volume network": (
        lambda x: TaskOrientedLoss(segmenter(3), cross_entropy)(x[0], labels(x)[:1]),
        "has 3 axes but the first layer of the task network is a Conv3d, which takes 5; give it such images with",
    ),
    "unbatched image for a critic": (
        lambda x: flat_critic().loss(x[0], x[0]),
        r"^wasserstein_critic: x_hat \(1, 6, 6\) has 3 axes but the first layer of the critic is a Conv2d, "
        r"which takes 4; add the batch axis with x_hat\[None\]",
    ),
    "unbatched image for the paper's critic": (
        lambda x: AdversarialLoss(WassersteinCritic(spatial_dims=2, patch_size=(6, 6)))(x[0, 0][None]),
        r"built for patches of \(6, 6\), got images \(1, 6, 6\); add the batch axis with x_hat\[None\]",
    ),
    "channels of a critic": (
        lambda x: flat_critic().loss(x.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)),
        r"^wasserstein_critic: x_hat \(2, 3, 6, 6\) has 3 channels but the critic takes 1",
    ),
    "critic in double": (
        lambda x: flat_critic().double().loss(x, x),
        r"^wasserstein_critic: the images are torch.float32 but the critic is torch.float64; "
        r"call critic.to\(torch.float32\)$",
    ),
    "critic in bfloat16": (
        lambda x: AdversarialLoss(flat_critic().bfloat16())(x),
        r"the images are torch.float32 but the critic is torch.bfloat16; call critic.to\(torch.float32\)$",
    ),
    "critic elsewhere": (
        lambda x: flat_critic().to("meta").loss(x, x),
        r"^wasserstein_critic: the images are on cpu but the critic is on meta; call critic.to\('cpu'\)$",
    ),
    "complex x_hat": (
        lambda x: gradient_maps(Fidelity(nn.MSELoss()), torch.complex(x, x), reference=x),
        r"x_hat must be real, got torch.complex64; give real and imaginary part as channels: "
        r"torch.cat\(\[x_hat.real, x_hat.imag\], 1\)",
    ),
    "complex reference": (
        lambda x: Fidelity(nn.MSELoss())(x, torch.complex(x, x)),
        r"^fidelity: reference must be real, got torch.complex64; .*torch.cat\(\[reference.real, reference.imag\], 1\)",
    ),
}


@pytest.mark.parametrize(("act", "sentence"), IMAGES.values(), ids=IMAGES)
def test_an_image_that_the_network_cannot_take(act, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        act(image())


def test_an_error_of_the_networks_own_is_left_as_it_is() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            raise RuntimeError("my own")

    x = image()
    with pytest.raises(RuntimeError, match="^my own$"):
        TaskOrientedLoss(Fails(), cross_entropy)(x, labels(x))
    with pytest.raises(RuntimeError, match="^my own$"):
        WassersteinCritic(network=Fails()).loss(x, x)


def test_a_network_may_take_what_its_first_convolution_would_not() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, signal):
            return self.conv(signal[:, :, None].expand(-1, 3, -1, -1))

    signal = torch.rand(2, 1, 5)
    assert TaskOrientedLoss(Repeats(), cross_entropy)(signal, torch.zeros(2, 1, 5).long()).isfinite()


def draw(tmp_path):
    plot_gradient_maps(gradient_maps(Fidelity(nn.MSELoss()), image(), reference=image()))


def write(tmp_path):
    maps = gradient_maps(Fidelity(nn.MSELoss()), image(3), reference=image(3))
    maps.to_nifti(tmp_path / "maps.nii.gz", torch.eye(4).numpy())


@pytest.mark.parametrize(
    ("package", "act", "where"),
    [("matplotlib", draw, "plot_gradient_maps"), ("nibabel", write, "to_nifti")],
)
def test_a_missing_package_names_the_extra(package, act, where, monkeypatch, tmp_path) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError,
        match=rf"^{where}: needs {package}, which is not installed; pip install 'taskloss\[figures\]'$",
    ):
        act(tmp_path)
