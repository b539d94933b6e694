"""Networks that compute their own loss: detectors and their like work as they come, and are left as they came."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from taskloss import InputError, LossSum, TaskOrientedLoss
from tests.ecosystem import (
    HuggingFaceStyle,
    LeftAsFound,
    boxes,
    classes,
    faster_rcnn,
    fcos,
    image,
    retinanet,
    rgb,
    total,
    warmed,
)

detectors = pytest.mark.parametrize("build", [faster_rcnn, retinanet, fcos], ids=lambda build: build.__name__)


@detectors
@pytest.mark.parametrize("training", [True, False], ids=["in-training-mode", "in-eval-mode"])
def test_a_detector_gives_its_training_loss_with_its_statistics_at_rest(
    build: Callable[[], nn.Module], training: bool
) -> None:
    detector = build().train(training)
    hand_net = copy.deepcopy(detector).train()
    for module in hand_net.modules():
        if not list(module.children()):
            module.eval()
    x, hand = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.manual_seed(5)  # detectors draw which proposals to learn from
    expected = total(hand_net(list(hand), boxes()))
    expected.backward()
    label = boxes()
    with LeftAsFound(detector):
        term = TaskOrientedLoss(detector, None, preprocess=list, output=total)
        digest = term.task_model.digest()
        torch.manual_seed(5)
        value = term(x, label)
        value.backward()
        assert term.task_model.digest() == digest, "batch statistics moved"
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert x.grad.any()
    assert not list(term.parameters())
    assert not any(m.training for m in term.task_model.network.modules() if isinstance(m, (nn.BatchNorm2d, nn.Dropout)))
    for found, asked in zip(label, boxes(), strict=True):
        assert torch.equal(found["boxes"], asked["boxes"]), "the boxes were changed in place"


def test_a_detector_stays_itself_in_a_parent_that_trains() -> None:
    term = TaskOrientedLoss(retinanet(), None, preprocess=list, output=total)
    parent = nn.ModuleDict({"loss": LossSum(task=term)})
    modes = [m.training for m in term.task_model.network.modules()]
    digest = term.task_model.digest()
    x = torch.rand(2, 3, 64, 64)
    values = [float(parent.train(mode)["loss"](x, label=boxes())) for mode in (True, False, True)]
    assert values == values[:1] * 3
    assert [m.training for m in term.task_model.network.modules()] == modes
    assert term.task_model.digest() == digest


def test_samples_without_boxes_are_left_out() -> None:
    term = TaskOrientedLoss(retinanet(), None, preprocess=list, output=total)
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    value = term(x, [None, boxes()[1]])
    value.backward()
    torch.testing.assert_close(value, term(x[1:], boxes()[1:]))
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_a_grey_image_reaches_a_detector_by_preprocess() -> None:
    term = TaskOrientedLoss(fcos(), None, preprocess=lambda x: list(rgb(x)), output=total)
    x = torch.rand(2, 1, 64, 64, requires_grad=True)
    term(x, boxes()).backward()
    assert x.grad.any()


def test_a_shared_detector_switched_back_to_training_mode_is_refused() -> None:
    detector = retinanet()
    term = TaskOrientedLoss(detector, None, preprocess=list, output=total, copy=False)
    assert term(torch.rand(2, 3, 64, 64), boxes()).isfinite()
    detector.train()
    with pytest.raises(InputError, match=r"'backbone\.1'|'backbone\.0'|'transform'.* switched to training mode"):
        term(torch.rand(2, 3, 64, 64), boxes())


def test_a_network_with_its_own_loss_is_the_same_as_its_logits_under_that_loss() -> None:
    x, label = image(16, 16), classes()
    net = warmed(HuggingFaceStyle(), x)
    own = TaskOrientedLoss(net, None, output=lambda out: out.loss)
    logits = TaskOrientedLoss(net, nn.CrossEntropyLoss(), output=lambda out: out.logits)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    with LeftAsFound(net):
        own(a, label).backward()
        logits(b, label).backward()
    torch.testing.assert_close(own(x, label), logits(x, label))
    torch.testing.assert_close(a.grad, b.grad)
