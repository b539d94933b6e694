"""The losses under autocast and in half precision: what needs float32 gets it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taskloss import (
    Fidelity,
    Frozen,
    GradientPenalty,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
)
from tests.properties import segmenter, soft_dice
from tests.scenes import small_critic, tod_net_loss, x_reference_label


class Doubled(nn.Module):
    """A task network without weights, so that it runs in whatever precision it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def dice_of_probabilities(p: Tensor, g: Tensor) -> Tensor:
    return 1 - (2 * (p * g).sum()) / (p.sum() + g.sum())


half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@half_types
@pytest.mark.parametrize("label_too", [False, True], ids=["label-float32", "label-half"])
def test_dice_over_four_million_voxels_is_finite_and_that_of_float32(dtype: torch.dtype, label_too: bool) -> None:
    x = torch.rand(1, 1, 160, 160, 160) / 2
    label = (x > 0.25).float()
    task = TaskOrientedLoss(Doubled(), dice_of_probabilities)
    exact = float(task(x, label))
    x_half = x.to(dtype).requires_grad_()
    value = task(x_half, label.to(dtype) if label_too else label)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(
        exact, abs=1e-4
    )  # what rounding the voxels themselves costs, and no more
    assert x_half.grad.dtype == dtype
    assert x_half.grad.isfinite().all()
    if dtype == torch.float16:
        naive = float(dice_of_probabilities(2 * x.half(), label.half()))
        assert not abs(naive - exact) < 0.1, "else the test shows nothing"


@half_types
@pytest.mark.parametrize("dims", [2, 3])
def test_under_autocast_a_dice_loss_is_that_of_the_half_precision_prediction_in_float32(
    dims: int, dtype: torch.dtype
) -> None:
    net = segmenter(dims)
    x = torch.rand(2, 1, *(8,) * dims)
    label = torch.randint(0, 2, (2, *(8,) * dims))
    with torch.autocast("cpu", dtype):
        prediction = Frozen(net)(x)
        value = TaskOrientedLoss(net, soft_dice)(x, label)
    assert prediction.dtype == dtype, "the network itself runs under the caller's autocast"
    assert torch.equal(value, soft_dice(prediction.float(), label))
    torch.testing.assert_close(value, TaskOrientedLoss(net, soft_dice)(x, label), atol=1e-2, rtol=0)


class Spy(nn.Module):
    """A criterion that notes the precision it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = a.flatten(1) @ a.flatten(1).T  # autocast would make this a half-precision product
        self.seen.append((a.dtype, b.dtype, product.dtype, torch.is_autocast_enabled("cpu")))
        return (a - b).square().mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda spy: TaskOrientedLoss(nn.Conv2d(1, 1, 1), spy),
        lambda spy: TaskConsistencyLoss(nn.Conv2d(1, 1, 1), spy),
        lambda spy: TaskConsistencyLoss(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), spy, layers=["0", "1"]),
        lambda spy: Fidelity(spy),
    ],
    ids=["task", "consistency", "consistency-at-layers", "fidelity"],
)
def test_under_autocast_every_criterion_runs_in_float32(build: Callable[[Callable[..., Tensor]], Term]) -> None:
    spy = Spy()
    term = build(lambda a, b: spy(a, b))
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = nn.Conv2d(1, 1, 1)(torch.rand(2, 1, 8, 8))
        term(x_hat, torch.rand(2, 1, 8, 8).bfloat16()).backward()
    assert x_hat.dtype == torch.bfloat16
    assert set(spy.seen) == {(torch.float32, torch.float32, torch.float32, False)}


Heads = namedtuple("Heads", ["out", "aux"])

CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda out, aux: {"out": out, "aux": aux},
    "ordered-dict": lambda out, aux: OrderedDict(out=out, aux=aux),
    "defaultdict": lambda out, aux: defaultdict(list, out=out, aux=aux),
    "list": lambda out, aux: [out, aux],
    "tuple": lambda out, aux: (out, aux),
    "named-tuple": lambda out, aux: Heads(out, aux),
    "nested": lambda out, aux: {"heads": [out, (aux,)]},
}


class Answers(nn.Module):
    """A task network that answers with a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container
        self.body = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.container(self.body(x), 2 * self.body(x))


@pytest.mark.parametrize("name", CONTAINERS)
def test_under_autocast_every_tensor_of_an_answer_reaches_the_criterion_in_float32(name: str) -> None:
    seen: list[Any] = []

    def criterion(answer: Any, label: Tensor) -> Tensor:
        seen.append(answer)
        leaves = tree_leaves(dict(answer) if isinstance(answer, defaultdict) else answer)
        assert [leaf.dtype for leaf in leaves] == [torch.float32] * 2
        return sum((leaf - label).square().mean() for leaf in leaves)

    term = TaskOrientedLoss(Answers(CONTAINERS[name]), criterion)
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        term(x, torch.zeros(2, 1, 4, 4)).backward()
    assert x.grad.any()
    if name != "defaultdict":
        assert type(seen[0]) is type(CONTAINERS[name](x, x))


def test_a_whole_step_under_autocast_is_close_to_that_of_float32() -> None:
    low, reference, label = x_reference_label()
    critic = small_critic(GradientPenalty(10.0))
    loss = tod_net_loss(critic)
    denoiser = nn.Conv2d(1, 1, 3, padding=1)
    gradients = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.breakdown(denoiser(low), reference=reference, label=label)
            scores = critic.breakdown(denoiser(low), reference)
        assert value.total.dtype == torch.float32
        assert scores.total.dtype == torch.float32
        gradients[enabled] = torch.autograd.grad(value.total, list(denoiser.parameters()))
    for half, full in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(half, full, atol=2e-3, rtol=5e-2)


def test_features_remembered_under_autocast_are_not_used_outside_it() -> None:
    term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), cache=True)
    reference = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(term(reference, reference)) == 0
    assert float(term(reference, reference)) == 0
