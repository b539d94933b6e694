"""A batch of no samples costs nothing and moves nothing, in every term and in the critic."""

import pytest
import torch
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    GradientPenalty,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    WassersteinCritic,
    WeightClipping,
    gradient_maps,
)
from tests.properties import cross_entropy, segmenter


def everything(critic: WassersteinCritic) -> LossSum:
    net = segmenter()
    return LossSum(
        adv=AdversarialLoss(critic),
        task=TaskOrientedLoss(net, cross_entropy),
        consistency=TaskConsistencyLoss(net, nn.MSELoss(), layers=["2"], cache=True),
        mse=Fidelity(nn.MSELoss()),
        l1=Fidelity(nn.L1Loss(), preprocess=lambda x: 2 * x),
    )


@pytest.mark.parametrize("constraint", [WeightClipping(), GradientPenalty()], ids=["clipping", "penalty"])
def test_no_samples(constraint) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 1))
    critic = WassersteinCritic(network=network, constraint=constraint)
    loss = everything(critic)
    x, reference = torch.rand(0, 1, 6, 6, requires_grad=True), torch.rand(0, 1, 6, 6)
    y = torch.zeros(0, 6, 6, dtype=torch.long)
    value = loss.breakdown(x, reference=reference, label=y)
    assert set(value.floats().values()) == {0.0}
    value.total.backward()
    assert x.grad.shape == x.shape
    assert loss(x, reference=reference, label=[]) == 0
    assert set(gradient_maps(loss, x, reference=reference, label=y).norms().values()) == {0.0}
    shares = dict.fromkeys(value.terms, 1.0)
    assert GradientBalancer(loss, shares=shares).backward(x, reference=reference, label=y).total == 0


@pytest.mark.parametrize("constraint", [WeightClipping(), GradientPenalty()], ids=["clipping", "penalty"])
def test_a_critic_without_samples_stays_as_it_is(constraint) -> None:
    critic = WassersteinCritic(
        network=nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 1)), constraint=constraint
    )
    optimizer = torch.optim.Adam(critic.parameters(), 0.01, weight_decay=0.1)
    for _ in range(2):
        critic.step(optimizer, torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6))
    before = {name: value.clone() for name, value in critic.state_dict().items() if isinstance(value, torch.Tensor)}
    none = torch.rand(0, 1, 6, 6)
    names = critic.breakdown(torch.rand(2, 1, 6, 6), torch.rand(2, 1, 6, 6)).terms
    value = critic.step(optimizer, none, none)
    assert set(value.floats().values()) == {0.0} and value.terms.keys() == names.keys()
    assert all(torch.equal(critic.state_dict()[name], tensor) for name, tensor in before.items())
    assert critic.distance(none, none) == 0
