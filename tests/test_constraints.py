"""The constraints under other people's critics: attention, compiled, in any precision, normed by any library."""

import pytest
import torch
from torch import nn

from taskloss import AdversarialLoss, GradientPenalty, InputError, WassersteinCritic, WeightClipping
from tests.properties import image


class Attentive(nn.Module):
    """Patches that look at one another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        self.attend = {
            "module": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
            "function": nn.Identity,
        }[kind]()
        self.kind = kind
        self.score = nn.Linear(8, 1)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        if self.kind == "module":
            seen = self.attend(tokens, tokens, tokens, need_weights=False)[0]
        elif self.kind == "encoder":
            seen = self.attend(tokens)
        else:
            seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.score((tokens + seen).mean(1))


def smooth() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 1))


def compiled_in_place() -> nn.Module:
    network = smooth()
    network.compile(backend="aot_eager")
    return network


NETWORKS = {
    "attention": (lambda: Attentive("module"), torch.float32),
    "transformer": (lambda: Attentive("encoder"), torch.float32),
    "sdpa": (lambda: Attentive("function"), torch.float32),
    "compiled": (lambda: torch.compile(smooth(), backend="aot_eager"), torch.float32),
    "compiled in place": (compiled_in_place, torch.float32),
    "bfloat16": (lambda: smooth().bfloat16(), torch.bfloat16),
    "attention in bfloat16": (lambda: Attentive("module").bfloat16(), torch.bfloat16),
    "float64": (lambda: smooth().double(), torch.float64),
}


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled critics need torch 2.6")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own look
@pytest.mark.parametrize(("build", "dtype"), NETWORKS.values(), ids=NETWORKS)
def test_a_penalised_critic_takes_a_step_and_the_denoiser_gets_a_gradient(build, dtype) -> None:
    critic = WassersteinCritic(network=build(), constraint=GradientPenalty())
    before = [p.detach().clone() for p in critic.parameters()]
    x_hat = image(dtype=dtype).requires_grad_()
    value = critic.step(torch.optim.SGD(critic.parameters(), lr=0.1), x_hat, image(dtype=dtype))
    assert value.floats()["penalty"] > 0
    assert any(not torch.equal(p, old) for p, old in zip(critic.parameters(), before, strict=True))
    AdversarialLoss(critic)(x_hat).backward()
    assert x_hat.grad.any() and x_hat.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_critic_of_any_precision_has_the_penalty_of_its_closed_form(dtype) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 1, bias=False))
    nn.init.constant_(network[1].weight, 0.5)  # of norm 3, exactly, in every dtype
    critic = WassersteinCritic(network=network.to(dtype), constraint=GradientPenalty())
    assert critic.breakdown(image(dtype=dtype), image(dtype=dtype)).floats()["penalty"] == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClipping(0.1)], ids=["penalty", "clipping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_reference_in_another_precision_is_brought_to_the_critics(dtype, constraint) -> None:
    critic = WassersteinCritic(network=smooth().to(dtype), constraint=constraint)
    x_hat, reference = image(dtype=dtype), image()
    for other in (torch.float64, torch.float32, torch.bfloat16):
        critic.step(torch.optim.SGD(critic.parameters(), lr=0.1), x_hat, reference.to(other))
        assert critic.distance(x_hat, reference.to(other)).isfinite()


def test_what_cannot_be_differentiated_twice_is_refused_in_one_sentence() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 1)

        def forward(self, x):
            return self.linear(Once.apply(x.flatten(1))).square()

    critic = WassersteinCritic(network=Network(), constraint=GradientPenalty())
    with pytest.raises(
        InputError, match=r"gradient_penalty: the critic cannot be differentiated twice.*WeightClipping\(0.01\)"
    ):
        critic.step(torch.optim.SGD(critic.parameters(), lr=0.1), image(), image())


# --- normalisation layers of other libraries -------------------------------------------------------------------------


def third_party(library: str, name: str, *args, **kwargs):
    def build() -> nn.Module:
        return getattr(pytest.importorskip(library), name)(*args, **kwargs)

    return build


class ActNorm(nn.Module):
    """As in Glow: a scale and a shift per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1, 4, 1, 1)), nn.Parameter(torch.ones(1, 4, 1, 1))


class InPlaceABN(ActNorm):
    """Named like the inplace_abn package's."""


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "RMSNorm of maps": lambda: nn.RMSNorm((4, 6, 6)),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm of maps": lambda: nn.LayerNorm((4, 6, 6)),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "ActNorm": ActNorm,
    "InPlaceABN": InPlaceABN,
    "timm LayerNorm2d": third_party("timm.layers", "LayerNorm2d", 4),
    "timm RmsNorm": third_party("timm.layers", "RmsNorm", 4),
    "timm BatchNormAct2d": third_party("timm.layers", "BatchNormAct2d", 4),
    "timm GRN": third_party("timm.layers.grn", "GlobalResponseNorm", 4),
}


@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_skip_norm_knows_the_norms_of_every_library(build) -> None:
    norm = build()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(1.0)
    WeightClipping(0.01, skip_norm=True).apply_(nn.Sequential(norm))
    assert all((p == 1).all() for p in norm.parameters())
    WeightClipping(0.01).apply_(nn.Sequential(norm))
    assert all((p <= 0.01).all() for p in norm.parameters()), "without skip_norm they are clamped"


class NormConv(nn.Conv2d):
    """A convolution whose name has a norm in it."""


@pytest.mark.parametrize(
    "build",
    [
        lambda: NormConv(2, 4, 3),
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
        lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)),
        lambda: nn.Linear(4, 1),
        lambda: nn.PReLU(4),
    ],
    ids=["NormConv", "weight_norm", "spectral_norm", "linear", "prelu"],
)
def test_skip_norm_spares_nothing_else(build) -> None:
    network = nn.Sequential(build())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    WeightClipping(0.01, skip_norm=True).apply_(network)
    assert all((p <= 0.01).all() for p in network.parameters())


@pytest.mark.parametrize("build", [InPlaceABN, NORMS["timm BatchNormAct2d"]], ids=["InPlaceABN", "BatchNormAct2d"])
def test_the_penalty_refuses_the_batch_norms_of_every_library(build) -> None:
    with pytest.raises(InputError, match="'0' is a .*, which mixes the samples of a batch"):
        WassersteinCritic(network=nn.Sequential(build()), constraint=GradientPenalty())
