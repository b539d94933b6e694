"""Small games and terms of every kind, for the tests of other people's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
    WassersteinCritic,
    WeightClipping,
)
from tests.properties import segmenter, soft_dice


def small_critic(constraint: Any = None) -> WassersteinCritic:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1))
    net(torch.zeros(1, 1, 8, 8))
    return WassersteinCritic(network=net, constraint=constraint or WeightClipping(0.05))


def x_reference_label() -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))


def tod_net_loss(critic: WassersteinCritic) -> LossSum:
    return LossSum(
        adv=0.1 * AdversarialLoss(critic),
        task=TaskOrientedLoss(segmenter(), soft_dice),
        see=2.0 * TaskConsistencyLoss(segmenter(), nn.MSELoss()),
        mse=0.5 * Fidelity(nn.MSELoss()),
    )


TERMS: dict[str, Callable[[], Term]] = {
    "adversarial": lambda: AdversarialLoss(small_critic()),
    "task": lambda: TaskOrientedLoss(segmenter(), nn.CrossEntropyLoss()),
    "task-checkpointed": lambda: TaskOrientedLoss(segmenter(), nn.CrossEntropyLoss(), checkpoint=True),
    "task-ensemble": lambda: TaskOrientedLoss([segmenter(), segmenter()], soft_dice),
    "consistency": lambda: TaskConsistencyLoss(segmenter(), nn.MSELoss()),
    "consistency-at-layers": lambda: TaskConsistencyLoss(segmenter(), nn.MSELoss(), layers=["0", "2"]),
    "consistency-cached": lambda: TaskConsistencyLoss(segmenter(), nn.MSELoss(), cache=True),
    "fidelity": lambda: Fidelity(nn.L1Loss()),
}
every_term = pytest.mark.parametrize("build", TERMS.values(), ids=TERMS.keys())


def target_of(term: Term, reference: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    return {"reference": (reference,), "label": (label,), None: ()}[term.reads]
