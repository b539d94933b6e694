"""Missing labels are left out of every nest, and a label's type never depends on the sizes in one batch."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from taskloss import InputError, TaskOrientedLoss
from tests.properties import cross_entropy, image, labels, segmenter

N = 3
X = torch.rand(N, 1, 8, 8)
Y = torch.randint(0, 2, (N, 8, 8))
KIND = torch.tensor([0, 1, 1])
FILLED = torch.full((8, 8), -1)
Pair = namedtuple("Pair", "mask kind")


class Heads(nn.Module):
    """A map and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = segmenter()

    def forward(self, x):
        seen = self.body(x)
        return seen, seen.mean((2, 3))


def both(prediction, label):
    mask, kind = (label["mask"], label["kind"]) if isinstance(label, dict) else (label[0], label[1])
    return cross_entropy(prediction[0], mask) + cross_entropy(prediction[1], kind)


def fill(tensor, i=1):
    tensor = tensor.clone()
    tensor[i] = -1
    return tensor


NONE_OR_FILLED = {
    "list with None": (None, [Y[0], None, Y[2]]),
    "tuple with None": (None, (Y[0], None, Y[2])),
    "dict of list with None": (None, {"mask": [Y[0], None, Y[2]], "kind": [0, None, 1]}),
    "tuple of lists with None": (None, ([Y[0], None, Y[2]], [0, None, 1])),
    "tensor": (-1, fill(Y)),
    "list": (-1, [Y[0], FILLED, Y[2]]),
    "numbers of NumPy": (-1, {"mask": fill(Y), "kind": [np.int64(0), np.int64(-1), np.int64(1)]}),
    "list of both": (-1, [Y[0], None, Y[2]]),
    "tuple": (-1, (Y[0], FILLED, Y[2])),
    "dict": (-1, {"mask": fill(Y), "kind": fill(KIND)}),
    "dict of lists": (-1, {"mask": [Y[0], FILLED, Y[2]], "kind": [0, -1, 1]}),
    "tuple of tensors": (-1, (fill(Y), fill(KIND))),
    "named tuple": (-1, Pair(fill(Y), fill(KIND))),
    "tuple of tensor and list": (-1, (fill(Y), [0, None, 1])),
    "dict of one": (-1, {"mask": fill(Y), "kind": [0, None, 1], "spacing_mm": 0.7}),
}


@pytest.mark.parametrize(("missing", "label"), NONE_OR_FILLED.values(), ids=NONE_OR_FILLED)
def test_a_sample_without_a_label_is_left_out(missing, label) -> None:
    nested = isinstance(label, dict) or (isinstance(label, tuple) and len(label) == 2)
    net, criterion = (Heads(), both) if nested else (segmenter(), cross_entropy)
    loss = TaskOrientedLoss(net, criterion, missing=missing)
    kept = torch.tensor([0, 2])
    expected = loss(X[kept], (Y[kept], KIND[kept]) if nested else Y[kept])
    x = X.clone().requires_grad_()
    value = loss(x, label)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert not x.grad[1].any() and x.grad[0].any() and x.grad[2].any()


@pytest.mark.parametrize(
    "label",
    [[None] * N, (None,) * N, [FILLED] * N, (FILLED,) * N, {"mask": fill(Y, slice(None))}, {"mask": [None] * N}],
    ids=["list None", "tuple None", "list", "tuple", "dict", "dict None"],
)
def test_a_batch_without_any_label_is_a_zero_that_back_propagates(label) -> None:
    x = X.clone().requires_grad_()
    value = TaskOrientedLoss(segmenter(), cross_entropy, missing=-1)(x, label)
    value.backward()
    assert value == 0 and not x.grad.any()


def test_a_sample_with_one_kind_of_label_and_without_another_is_refused() -> None:
    loss = TaskOrientedLoss(Heads(), both, missing=-1)
    for label in ({"mask": fill(Y), "kind": KIND}, {"mask": [Y[0], None, Y[2]], "kind": KIND}):
        with pytest.raises(InputError, match=r"sample 1 has a label, but none in label\['mask'\]; give every label of"):
            loss(X, label)


def test_a_label_that_is_whole_reaches_the_criterion_as_it_came() -> None:
    seen = []
    loss = TaskOrientedLoss(segmenter(), lambda p, t: seen.append(t) or cross_entropy(p, t["mask"]), missing=-1)
    label = {"mask": Y, "name": "liver", "class_weight": torch.ones(2)}
    loss(X, label)
    assert type(seen[0]) is dict and list(seen[0]) == list(label)
    assert torch.equal(seen[0]["mask"], Y) and seen[0]["name"] == "liver" and len(seen[0]["class_weight"]) == 2


def test_what_belongs_to_the_whole_batch_is_passed_on() -> None:
    seen = []
    loss = TaskOrientedLoss(segmenter(), lambda p, t: seen.append(t) or cross_entropy(p, t["mask"], t["w"]), missing=-1)
    loss(X, {"mask": fill(Y), "w": torch.tensor([0.2, 0.8]), "names": ("a", "b")})
    assert torch.equal(seen[0]["w"], torch.tensor([0.2, 0.8])) and seen[0]["names"] == ("a", "b")


def test_an_image_without_boxes_has_a_label() -> None:
    seen = []
    loss = TaskOrientedLoss(segmenter(), lambda p, t: seen.append(t) or p.mean(), missing=-1)
    boxes = [{"boxes": torch.zeros(0, 4)}, {"boxes": torch.ones(2, 4)}, None]
    loss(X, boxes)
    assert [entry["boxes"].shape for entry in seen[0]] == [(0, 4), (2, 4)]


LISTS = {
    "sequences": ([torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([1, 1])], list),
    "sequences of one length": ([torch.tensor([1, 2]), torch.tensor([1, 0]), torch.tensor([1, 1])], list),
    "sequences, one alone": ([None, torch.tensor([1, 2]), None], list),
    "boxes": ([torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 4)], list),
    "boxes of one number": ([torch.ones(2, 4)] * N, list),
    "tuple of sequences": ((torch.tensor([1, 2]), torch.tensor([1, 1]), None), tuple),
    "dicts": ([{"boxes": torch.ones(1, 4)}] * N, list),
    "tuple of dicts": (({"boxes": torch.ones(N, 4)},) * N, tuple),
    "maps": ([Y[0], Y[1], Y[2]], torch.Tensor),
    "one map": ([None, Y[1], None], torch.Tensor),
    "maps with channels": ([Y[0][None], Y[1][None], None], torch.Tensor),
    "classes": ([torch.tensor(0), torch.tensor(1), None], torch.Tensor),
    "numbers": ([0, 1, None], torch.Tensor),
    "vectors like the prediction": ([torch.ones(5), torch.zeros(5), None], torch.Tensor),
    "small maps like the prediction": ([torch.ones(4, 4)] * N, torch.Tensor),
}


@pytest.mark.parametrize(("label", "kind"), LISTS.values(), ids=LISTS)
def test_the_type_that_a_list_reaches_the_criterion_with(label, kind) -> None:
    class Shaped(nn.Module):
        def __init__(self, *shape) -> None:
            super().__init__()
            self.shape = shape

        def forward(self, x):
            return x.mean((1, 2, 3)).reshape(-1, *(1,) * len(self.shape)).expand(-1, *self.shape)

    shape = {5: (5,), 4: (2, 4, 4)}.get(label[0].shape[-1] if torch.is_tensor(label[0]) and label[0].dim() else 0)
    seen = []
    net = Shaped(*(shape or (2, 8, 8)))
    TaskOrientedLoss(net, lambda p, t: seen.append(t) or p.mean())(X, label)
    assert type(seen[0]) is kind
    assert len(seen[0]) == sum(entry is not None for entry in label)


def test_missing_costs_one_transfer(monkeypatch) -> None:
    transfers = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, name=name: transfers.append(name) or original(self)
        )
    loss = TaskOrientedLoss(Heads(), both, missing=-1)
    loss(X, {"mask": fill(Y), "kind": [torch.tensor(0), torch.tensor(-1), torch.tensor(1)]})
    assert transfers == ["tolist"]


def test_missing_under_vmap_is_explained() -> None:
    loss = TaskOrientedLoss(segmenter(), cross_entropy, missing=-1)
    with pytest.raises(InputError, match=r"missing=... reads the label, which torch.func forbids"):
        torch.func.vmap(torch.func.grad(lambda a, b: loss(a[None], b[None])))(image(), labels(image()))
