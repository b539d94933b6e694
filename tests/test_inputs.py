"""Networks that take more than the image: a prompt, a timestep, metadata."""

import pytest
import torch
from torch import nn

from taskloss import (
    Fidelity,
    GradientBalancer,
    InputError,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    gradient_maps,
)
from tests.properties import cross_entropy


class Prompted(nn.Module):
    """Like SAM: segments what a box points at."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.prompt = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, image, boxes, scale=1.0):
        assert len(image) == len(boxes), "a prompt for each image"
        return self.head(torch.tanh(self.image(image) + scale * self.prompt(boxes)[:, :, None, None]))


N = 3
X = torch.rand(N, 1, 8, 8)
MASK = torch.randint(0, 2, (N, 8, 8))
BOXES = torch.rand(N, 4)
LABEL = {"mask": MASK, "boxes": BOXES}


def by_hand(net, kept=slice(None), **more):
    return cross_entropy(net.eval()(X[kept], BOXES[kept], **more), MASK[kept])


FIXED = {
    "tuple": lambda x: (x, BOXES),
    "dict": lambda x: {"image": x, "boxes": BOXES},
    "tuple with a constant": lambda x: (x, BOXES, 1.0),
}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("preprocess", FIXED.values(), ids=FIXED)
def test_a_tuple_or_dict_from_preprocess_is_the_networks_arguments(preprocess, checkpoint) -> None:
    net = Prompted()
    loss = TaskOrientedLoss(net, cross_entropy, preprocess=preprocess, checkpoint=checkpoint)
    x = X.clone().requires_grad_()
    value = loss(x, MASK)
    value.backward()
    torch.testing.assert_close(value, by_hand(net))
    assert x.grad.any()
    assert loss.predict(x).shape == (N, 2, 8, 8)


@pytest.mark.parametrize("layers", [None, ["image", "head"]], ids=["output", "layers"])
@pytest.mark.parametrize("preprocess", FIXED.values(), ids=FIXED)
def test_consistency_takes_them_too(preprocess, layers) -> None:
    net = Prompted()
    loss = TaskConsistencyLoss(net, nn.MSELoss(), layers=layers, preprocess=preprocess)
    x, reference = X.clone().requires_grad_(), torch.rand_like(X)
    loss(x, reference).backward()
    assert x.grad.any() and loss(X, X) == 0
    if layers is None:
        torch.testing.assert_close(loss(X, reference), nn.functional.mse_loss(net(X, BOXES), net(reference, BOXES)))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
def test_the_label_carries_what_is_different_for_each_sample(checkpoint) -> None:
    net = Prompted()
    loss = TaskOrientedLoss(net, nn.CrossEntropyLoss(), inputs=["boxes"], checkpoint=checkpoint)
    x = X.clone().requires_grad_()
    value = loss(x, LABEL)
    value.backward()
    torch.testing.assert_close(value, by_hand(net))
    assert x.grad.any()
    torch.testing.assert_close(loss.predict(X, {"boxes": BOXES}), net.eval()(X, BOXES))
    total = LossSum(task=loss, mse=Fidelity(nn.MSELoss()))
    maps = gradient_maps(total, X, reference=X, label=LABEL)
    torch.testing.assert_close(maps.maps["task"], x.grad)
    x_hat = X.clone().requires_grad_()
    GradientBalancer(total, shares={"task": 1, "mse": 1}).backward(x_hat * 1, reference=X, label=LABEL)
    assert x_hat.grad.any()


MISSING = {
    "fixed prompts": ((), lambda x: (x, BOXES), [MASK[0], None, MASK[2]], None),
    "prompts of the images": ((), lambda x: (x, BOXES[[0, 2]][: len(x)]), [MASK[0], None, MASK[2]], None),
    "list of masks": (["boxes"], None, {"mask": [MASK[0], None, MASK[2]], "boxes": BOXES}, None),
    "list of dicts": (
        "boxes",
        None,
        [{"mask": MASK[0], "boxes": BOXES[0]}, None, {"mask": MASK[2], "boxes": BOXES[2]}],
        None,
    ),
    "filled": (["boxes"], None, {"mask": MASK.index_fill(0, torch.tensor([1]), -1), "boxes": BOXES}, -1),
    "filled, and so is a prompt": (
        ["boxes"],
        None,
        {"mask": MASK.index_fill(0, torch.tensor([1]), -1), "boxes": BOXES.index_fill(0, torch.tensor([1]), -1)},
        -1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("inputs", "preprocess", "label", "missing"), MISSING.values(), ids=MISSING)
def test_a_sample_without_a_label_takes_its_inputs_along(inputs, preprocess, label, missing) -> None:
    net = Prompted()
    loss = TaskOrientedLoss(net, cross_entropy, inputs=inputs, preprocess=preprocess, missing=missing)
    torch.testing.assert_close(loss(X, label), by_hand(net, torch.tensor([0, 2])))


def test_several_entries_that_are_left_reach_the_criterion_as_a_dict() -> None:
    net = Prompted()
    loss = TaskOrientedLoss(
        net, lambda p, label: label["weight"].mean() * cross_entropy(p, label["mask"]), inputs=["boxes", "scale"]
    )
    label = {**LABEL, "scale": 2.0, "weight": torch.full((N,), 3.0)}
    torch.testing.assert_close(loss(X, label), 3 * by_hand(net, scale=2.0))


def test_a_network_with_its_own_loss_takes_inputs_too() -> None:
    class Own(Prompted):
        def forward(self, image, boxes, labels=None):
            return cross_entropy(super().forward(image, boxes), labels)

    net = Own()
    expected = net.eval()(X, BOXES, labels=MASK)
    torch.testing.assert_close(TaskOrientedLoss(net, None, inputs=["boxes"])(X, LABEL), expected)
    torch.testing.assert_close(TaskOrientedLoss(net, None, preprocess=FIXED["tuple"])(X, MASK), expected)
    torch.testing.assert_close(TaskOrientedLoss(net, None, preprocess=FIXED["dict"])(X, MASK), expected)


SENTENCES = {
    "no dict": (MASK, r"inputs=\['boxes'\] are read off the label, which must be a dict .* got Tensor; for instance"),
    "no such key": ({"mask": MASK, "box": BOXES}, r"the label has no 'boxes', which inputs= names; did you mean 'box'"),
    "ragged": (
        [{"mask": MASK[0], "boxes": torch.rand(1, 4)}, {"mask": MASK[1], "boxes": torch.rand(2, 4)}, None],
        r"the samples' 'boxes' have shapes \(1, 4\), \(2, 4\); pad them to one",
    ),
    "nothing else": ({"boxes": BOXES}, r"holds nothing but the network's inputs \['boxes'\]; add the label itself"),
}


@pytest.mark.parametrize(("label", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_a_label_without_them_gets_one_sentence(label, sentence) -> None:
    with pytest.raises(InputError, match="^task: .*" + sentence):
        LossSum(task=TaskOrientedLoss(Prompted(), cross_entropy, inputs=["boxes"]))(X, label=label)


def test_only_the_image_is_checked_for_its_range_and_precision() -> None:
    class Timed(Prompted):
        def forward(self, image, boxes, timestep):
            return super().forward(image, boxes) + timestep[:, None, None, None]

    steps = torch.tensor([0, 500, 999])
    loss = TaskOrientedLoss(Timed(), cross_entropy, preprocess=lambda x: (x, BOXES, steps), expects=(0, 1))
    assert loss(X, MASK).isfinite()
    with pytest.raises(InputError, match=r"but \[0, 1\] is expected"):
        TaskOrientedLoss(Timed(), cross_entropy, preprocess=lambda x: (9 * x, BOXES, steps), expects=(0, 1))(X, MASK)
