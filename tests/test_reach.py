"""A gradient that does not reach x_hat is refused by name, without the search failing; a constant zero is no fault."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import Fidelity, InputError, LossSum, TaskConsistencyLoss, TaskOrientedLoss
from taskloss.reach import reaches
from tests.properties import cross_entropy, image, labels, segmenter


def leaf(**kwargs):
    return image(**kwargs).requires_grad_()


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x, label):
        return F.cross_entropy(self.head(x.detach()), label)


class Detaches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.head(x.detach())


class FailsWhenAsked(nn.Module):
    """Works once and then never again: the search for who blocks must not make it the caller's problem."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no more")
        return x.detach() * torch.ones(1, 2, 1, 1)


def scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Detaches())


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: TaskOrientedLoss(OwnLoss(), None), "'OwnLoss' blocks it"),
        (lambda: TaskOrientedLoss(scripted(), cross_entropy), "'.*' blocks it"),
        (lambda: TaskOrientedLoss(FailsWhenAsked(), cross_entropy), "the output function or the criterion blocks it"),
        (lambda: TaskOrientedLoss(segmenter(), cross_entropy, preprocess=lambda x: x.detach()), "preprocess blocks it"),
        (lambda: TaskOrientedLoss(segmenter(), lambda p, y: p.argmax(1).float().mean() + 1), "the output function or"),
        (
            lambda: TaskOrientedLoss(segmenter(), cross_entropy, output=lambda p: p.detach().requires_grad_()),
            "the output function or the criterion",
        ),
    ],
    ids=["own loss", "scripted", "fails when asked", "preprocess", "criterion", "another graph"],
)
def test_the_blocker_is_named(make, culprit) -> None:
    x = leaf()
    with pytest.raises(InputError, match=rf"task_oriented_loss: the gradient does not reach x_hat; {culprit}"):
        make()(x, labels(x))


def test_other_terms_say_so_too() -> None:
    x, reference = leaf(), image()
    with pytest.raises(InputError, match="fidelity: the gradient does not reach x_hat; the criterion blocks it"):
        Fidelity(lambda a, b: (a - b).detach().square().mean())(x, reference)
    with pytest.raises(InputError, match="fidelity: the gradient does not reach x_hat; preprocess blocks it"):
        Fidelity(nn.MSELoss(), preprocess=lambda t: t.detach())(x, reference)
    with pytest.raises(InputError, match="consistency_loss: the gradient does not reach x_hat; 'Detaches' blocks it"):
        TaskConsistencyLoss(Detaches(), nn.MSELoss())(x, reference)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network_has_no_gradient_and_says_so() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
    net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(InputError, match="the gradient does not reach x_hat; '1' blocks it"):
        TaskOrientedLoss(net, cross_entropy)(leaf(), torch.tensor([0, 1]))
    with torch.no_grad():
        assert TaskOrientedLoss(net, cross_entropy)(image(), torch.tensor([0, 1])) > 0


@pytest.mark.parametrize("zero", [lambda: torch.tensor(0.0), lambda: 0, lambda: 0.0, lambda: torch.zeros(1)])
@pytest.mark.parametrize("kind", ["task", "fidelity", "consistency"])
def test_a_criterion_may_give_a_constant_zero(zero, kind) -> None:
    def criterion(a, b):
        return zero()

    x = leaf()
    make = {
        "task": lambda: TaskOrientedLoss(segmenter(), criterion),
        "fidelity": lambda: Fidelity(criterion),
        "consistency": lambda: TaskConsistencyLoss(segmenter(), criterion),
    }[kind]
    value = LossSum(a=make())(x, label=labels(x), reference=image())
    value.backward()
    assert value == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_reaches_follows_the_graph_to_this_very_tensor() -> None:
    x = leaf()
    a, b = (2 * x).unbind(0)
    c = 3 * a
    assert reaches(c.sum(), a) and reaches(c.sum(), x) and reaches(x, x)
    assert not reaches(c.sum(), b) and not reaches(c.detach().requires_grad_().sum(), x)
