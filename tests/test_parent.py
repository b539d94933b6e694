"""The losses inside a parent module: moved, copied, saved and resumed with it, and their networks left alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    Frozen,
    LossSum,
    LossValue,
    TaskConsistencyLoss,
    TaskOrientedLoss,
)
from tests.properties import segmenter, soft_dice
from tests.scenes import small_critic, x_reference_label


class LitDenoiser(nn.Module):
    """What a LightningModule is to its losses: denoiser, critic and loss in one module that gets trained and saved."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=1))
        self.critic = small_critic()
        task = TaskOrientedLoss([segmenter(), segmenter()], nn.CrossEntropyLoss(), ensemble="turns")
        shared = Frozen(segmenter())
        self.loss = LossSum(
            adv=AdversarialLoss(self.critic),
            task=task,
            dice=TaskOrientedLoss(shared, soft_dice),
            see=TaskConsistencyLoss(shared, nn.MSELoss(), cache=True),
            l1=Fidelity(nn.L1Loss()),
        )

    def forward(self, low: Tensor, reference: Tensor, label: Tensor) -> LossValue:
        return self.loss.breakdown(self.denoiser(low), reference=reference, label=label)

    def frozen(self) -> list[Frozen]:
        return [module for module in self.modules() if isinstance(module, Frozen)]

    def digests(self) -> list[str]:
        return [frozen.digest() for frozen in self.frozen()]


def initialise(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def train_one_step(parent: LitDenoiser) -> None:
    parent.requires_grad_(True).train()
    everything = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5)
    low, reference, label = x_reference_label()
    parent.critic.step(torch.optim.RMSprop(parent.critic.parameters()), parent.denoiser(low), reference)
    parent(low, reference, label).total.backward()
    everything.step()


def there_and_back(parent: LitDenoiser) -> None:
    parent.to(torch.float64)
    assert all(t.dtype == torch.float64 for f in parent.frozen() for t in f.network.parameters())
    parent.to(torch.float32)


def load_what_was_saved(parent: LitDenoiser) -> None:
    file = io.BytesIO()
    torch.save(LitDenoiser().state_dict(), file)
    file.seek(0)
    parent.load_state_dict(torch.load(file, weights_only=True), strict=True)


PARENT_DOES: dict[str, Callable[[LitDenoiser], Any]] = {
    "train": lambda parent: parent.train(),
    "eval-train": lambda parent: parent.eval().train(),
    "apply-init": lambda parent: parent.apply(initialise),
    "to-float64-and-back": there_and_back,
    "requires-grad": lambda parent: parent.requires_grad_(True),
    "zero-grad": lambda parent: parent.zero_grad(),
    "strict-load": load_what_was_saved,
    "one-step-of-everything": train_one_step,
    "share-memory": lambda parent: parent.share_memory(),
    "channels-last": lambda parent: parent.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("act", PARENT_DOES.values(), ids=PARENT_DOES.keys())
def test_nothing_that_happens_to_a_parent_changes_its_task_networks(act: Callable[[LitDenoiser], Any]) -> None:
    parent = LitDenoiser()
    digests, networks = parent.digests(), [f.network for f in parent.frozen()]
    with_weights = [network for network in networks if list(network.parameters())]
    assert len(with_weights) == 3, "two networks take turns and one is shared by two terms"
    act(parent)
    assert parent.digests() == digests
    assert [f.network for f in parent.frozen()] == networks
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert parent(*x_reference_label()).total.isfinite()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda parent: pickle.loads(pickle.dumps(parent))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_parent_is_whole_and_apart(duplicate: Callable[[LitDenoiser], LitDenoiser]) -> None:
    parent = LitDenoiser().eval()
    batch = x_reference_label()
    parent(*batch)  # fills the cache
    again = duplicate(parent)
    assert again.digests() == parent.digests()
    assert again.loss.terms["adv"].critic is again.critic, "the copy's loss would be judged by the original's critic"
    dice, see = again.loss.terms["dice"], again.loss.terms["see"]
    assert dice.task_model is see.task_model, "a shared network was doubled"
    assert torch.equal(again(*batch).total, parent(*batch).total)
    with torch.no_grad():
        next(again.loss.terms["task"].task_model.network.parameters()).zero_()
    assert again.digests() != parent.digests()


def test_a_checkpoint_holds_the_denoiser_and_the_critic_and_no_task_network() -> None:
    parent = LitDenoiser()
    tensors = {name for name, value in parent.state_dict().items() if isinstance(value, Tensor)}
    assert {name.split(".")[0] for name in tensors} == {"denoiser", "critic"}
    assert {name.split(".")[0] for name, _ in parent.named_parameters()} == {"denoiser", "critic"}


def test_a_resumed_ensemble_takes_the_turn_where_it_was() -> None:
    x, _, label = x_reference_label()
    term = TaskOrientedLoss([segmenter(), segmenter()], nn.CrossEntropyLoss(), ensemble="turns")
    first = term(x, label)
    state = term.state_dict()
    second = term(x, label)
    term.load_state_dict(state, strict=True)
    assert torch.equal(term(x, label), second)
    assert torch.equal(term(x, label), first)


def test_the_critic_is_moved_and_saved_by_its_owner_alone() -> None:
    critic = small_critic()
    loss = LossSum(adv=AdversarialLoss(critic)).to(torch.float64)
    assert not loss.state_dict()
    assert next(critic.parameters()).dtype == torch.float32
