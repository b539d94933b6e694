"""Networks, losses and metrics of other libraries work as they come, and are left as they came."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import TaskConsistencyLoss, TaskOrientedLoss
from tests.ecosystem import (
    CASES,
    Case,
    LeftAsFound,
    classes,
    every_case,
    image,
    warmed,
)


@every_case
def test_a_task_loss_is_the_criterion_of_the_network_in_eval_mode(build: Callable[[], Case]) -> None:
    case = build()
    x, label_before = case.x_hat.clone().requires_grad_(), case.label.clone()
    hand = case.x_hat.clone().requires_grad_()
    criterion = copy.deepcopy(case.criterion)
    expected = criterion(case.by_hand(hand), case.label)
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskOrientedLoss(case.network, case.criterion, **case.options)
        digest = term.task_model.digest()
        value = term(x, case.label)
        value.backward()
        assert term.task_model.digest() == digest
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert x.grad.any()
    assert torch.equal(x.detach(), case.x_hat), "x_hat was changed in place"
    assert torch.equal(case.label, label_before), "the label was changed in place"
    assert not list(term.parameters())
    assert not term.state_dict()


@pytest.mark.parametrize(
    "name",
    ["smp-unet-dice", "monai-unet-3d-dice", "monai-deep-supervision-2d", "torchvision-mobilenet", "timm-vit"],
)
def test_a_consistency_loss_is_the_distance_of_two_eval_outputs(name: str) -> None:
    case = CASES[name]()
    reference = torch.rand_like(case.x_hat)
    x, hand = (case.x_hat.clone().requires_grad_() for _ in range(2))
    expected = F.mse_loss(case.by_hand(hand), case.by_hand(reference).detach())
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskConsistencyLoss(case.network, nn.MSELoss(), **case.options)
        value = term(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)
    assert float(term(reference, reference)) == 0


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("torchvision-squeezenet", ["features.2", "features.5"]),
        ("timm-resnet", ["layer1", "layer3"]),
        ("smp-unet-dice", ["encoder", "decoder"]),
        ("monai-unet-3d-dice", ["model.0"]),
    ],
    ids=["torchvision-squeezenet", "timm-resnet", "smp-unet", "monai-unet-3d"],
)
def test_a_perceptual_loss_compares_the_named_layers_of_other_peoples_networks(name: str, layers: list[str]) -> None:
    case = CASES[name]()
    x, hand = (case.x_hat.clone().requires_grad_() for _ in range(2))
    reference = torch.rand_like(case.x_hat)
    first = (lambda f: f[-1] if isinstance(f, (list, tuple)) else f) if name.startswith("smp") else None

    def features(image: Tensor) -> list[Tensor]:
        network, seen = copy.deepcopy(case.network).eval(), []
        for layer in layers:
            network.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out))
        network(image if case.preprocess is None else case.preprocess(image))
        return seen if first is None else [first(f) for f in seen]

    pairs = zip(features(hand), features(reference), strict=True)
    expected = sum(F.l1_loss(a, b.detach()) for a, b in pairs)
    expected.backward()
    with LeftAsFound(case.network):
        term = TaskConsistencyLoss(case.network, nn.L1Loss(), layers=layers, preprocess=case.preprocess, output=first)
        value = term(x, reference)
        value.backward()
    torch.testing.assert_close(value.detach(), expected.detach())
    torch.testing.assert_close(x.grad, hand.grad)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["smp-unet-dice", "monai-unet-2d-dice-ce", "timm-vit"])
def test_a_copied_or_pickled_task_loss_says_the_same(name: str, how: str) -> None:
    case = CASES[name]()
    term = TaskOrientedLoss(case.network, case.criterion, preprocess=case.preprocess)
    again = copy.deepcopy(term) if how == "deepcopy" else pickle.loads(pickle.dumps(term))
    assert torch.equal(again(case.x_hat, case.label), term(case.x_hat, case.label))
    assert again.task_model.digest() == term.task_model.digest()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_torchscript_network_is_frozen_like_any_other() -> None:
    net = warmed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)), image(8, 8))
    scripted = torch.jit.script(net)
    x, hand = (torch.zeros(2, 1, 8, 8).requires_grad_() for _ in range(2))
    label = classes(4, 4)
    TaskOrientedLoss(net, nn.CrossEntropyLoss())(hand, label).backward()
    with LeftAsFound(scripted):
        term = TaskOrientedLoss(scripted, nn.CrossEntropyLoss())
        term(x, label).backward()
    torch.testing.assert_close(x.grad, hand.grad)
    assert not list(term.parameters())
