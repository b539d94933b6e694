"""The losses under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from taskloss import (
    Fidelity,
    LossSum,
    TaskOrientedLoss,
)
from tests.properties import segmenter
from tests.scenes import TERMS, small_critic, target_of, tod_net_loss, x_reference_label


def assert_compiles(loss: nn.Module, *targets: Any, **named: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    plain.requires_grad_()
    traced.requires_grad_()
    expected = loss(plain, *targets, **named)
    value = compiled(traced, *targets, **named)
    expected.backward()
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(traced.grad, plain.grad)


critics_compile = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="before torch 2.6 functional_call cannot be compiled whole"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("adversarial", marks=critics_compile),
        "task",
        "task-checkpointed",
        "task-ensemble",
        "consistency",
        "fidelity",
    ],
)
def test_a_term_compiles_to_one_graph_with_the_same_value_and_gradient(name: str) -> None:
    _, reference, label = x_reference_label()
    term = TERMS[name]()
    assert_compiles(term, *target_of(term, reference, label))


@critics_compile
def test_a_sum_compiles_to_one_graph_with_the_same_value_and_gradient() -> None:
    _, reference, label = x_reference_label()
    assert_compiles(tod_net_loss(small_critic()), reference=reference, label=label)


def test_a_scheduled_sum_compiles_to_one_graph() -> None:
    _, reference, label = x_reference_label()
    loss = LossSum(task=(lambda step: step / 10) * TERMS["task"](), mse=Fidelity(nn.MSELoss()))
    assert_compiles(loss, reference=reference, label=label, step=3)


def test_a_network_compiled_by_the_caller_is_frozen_like_any_other() -> None:
    net = segmenter()
    x, _, label = x_reference_label()
    compiled = TaskOrientedLoss(torch.compile(net, backend="eager"), nn.CrossEntropyLoss())
    torch.testing.assert_close(compiled(x, label), TaskOrientedLoss(net, nn.CrossEntropyLoss())(x, label))
    assert not list(compiled.parameters())
