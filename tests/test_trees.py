"""Nests of tensors of every kind are mapped, walked, and cast to full precision."""

import types
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from taskloss import TaskOrientedLoss
from taskloss.precision import full_precision
from taskloss.trees import tensors_in
from tests.properties import image, labels

Pair = namedtuple("Pair", "logits rest")


@dataclass
class Output:
    logits: Tensor
    rest: object = None


@dataclass(frozen=True)
class FrozenOutput:
    logits: Tensor
    rest: object = None
    made: int = field(init=False, default=3)


@dataclass
class WithSlots:
    __slots__ = ("logits",)
    logits: Tensor


NESTS = {
    "dataclass": lambda t: Output(t, {"k": [t]}),
    "frozen dataclass": lambda t: FrozenOutput(t, (t, "s")),
    "dataclass with slots": WithSlots,
    "namespace": lambda t: types.SimpleNamespace(logits=t, rest=[Output(t)]),
    "named tuple": lambda t: Pair(t, Output(t)),
    "ordered dict": lambda t: OrderedDict(logits=t, rest=Output(t)),
    "default dict": lambda t: defaultdict(list, logits=t, rest=[t]),
    "list": lambda t: [Output(t), 1, None],
}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_every_half_tensor_of_a_nest_is_widened(nest, half) -> None:
    tree = nest(torch.ones(2, dtype=half))
    wide = full_precision(tree)
    assert {t.dtype for t in tensors_in(wide)} == {torch.float32}
    assert {t.dtype for t in tensors_in(tree)} == {half}, "the network's own output was changed"
    assert type(wide) is type(tree) or isinstance(tree, defaultdict)
    assert len(list(tensors_in(wide))) == len(list(tensors_in(tree)))
    assert full_precision(wide) is wide


def test_a_dataclass_reaches_the_criterion_in_float32_under_autocast() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return Output(self.conv(x))

    seen = []
    loss = TaskOrientedLoss(Net(), lambda o, y: seen.append(o.logits.dtype) or o.logits.square().mean())
    x = image()
    with torch.autocast("cpu", torch.bfloat16):
        loss(x, labels(x))
    assert seen == [torch.float32]
