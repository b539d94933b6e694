"""A range is checked until an image has shown it: nothing wrong passes, nothing right is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from taskloss import Fidelity, InputError, TaskConsistencyLoss, TaskOrientedLoss
from taskloss.ranges import RangeCheck
from tests.properties import cross_entropy, image, labels, segmenter

SAYS_NOTHING = {
    "zeros": torch.zeros(2, 1, 8, 8),
    "constant": torch.full((2, 1, 8, 8), 0.7),
    "nan": torch.full((2, 1, 8, 8), float("nan")),
    "nan somewhere": torch.rand(2, 1, 8, 8).index_fill_(3, torch.tensor([0]), float("nan")),
    "infinite": torch.full((2, 1, 8, 8), float("inf")),
    "nearly constant": 0.5 + 0.01 * torch.rand(2, 1, 8, 8),
}


def task(expects):
    return TaskOrientedLoss(segmenter(), cross_entropy, expects=expects)


def looker(kind, expects=(0, 1)):
    """A term that checks its range, as a function of the image alone."""
    if kind == "task":
        loss = task(expects)
        return lambda x: loss(x, labels(x))
    network = segmenter()
    loss = {
        "fidelity": lambda: Fidelity(nn.MSELoss(), expects=expects),
        "consistency": lambda: TaskConsistencyLoss(network, nn.MSELoss(), expects=expects),
    }[kind]()
    return lambda x: loss(x, x)


@pytest.mark.parametrize("kind", ["task", "fidelity", "consistency"])
@pytest.mark.parametrize("first", SAYS_NOTHING.values(), ids=SAYS_NOTHING)
def test_a_first_batch_that_says_nothing_does_not_use_the_check_up(kind, first) -> None:
    look = looker(kind)
    look(first)
    with pytest.raises(InputError, match=r"the input spans \[.*\] but \[0, 1\] is expected"):
        look(1000 * torch.randn(2, 1, 8, 8))


RIGHT = {
    "bright in (-1, 1)": ((-1, 1), 0.1 + 0.9 * image(size=16)),
    "half as bright in (-1, 1)": ((-1, 1), 0.5 + 0.4 * image(size=16)),
    "constant one in (-1, 1)": ((-1, 1), torch.ones(2, 1, 16, 16)),
    "flat about zero in (-1, 1)": ((-1, 1), 0.05 * image(size=16)),
    "nearly constant in (0, 1)": ((0, 1), 0.3 + 0.003 * image(size=16)),
    "air in (0, 1)": ((0, 1), 0.001 * image(size=16)),
    "water in (-1000, 1000)": ((-1000, 1000), image(size=16) - 0.5),
    "soft tissue in (-1024, 3071)": ((-1024, 3071), 40 + 200 * image(size=16)),
    "soft tissue in (-1000, 1000)": ((-1000, 1000), 2 + 250 * image(size=16)),
    "dark in (0, 255)": ((0, 255), 0.4 * image(size=16)),
}


@pytest.mark.parametrize(("expects", "x"), RIGHT.values(), ids=RIGHT)
def test_images_at_home_in_the_range_are_accepted(expects, x) -> None:
    assert task(expects)(x, labels(x)).isfinite()


WRONG = {
    "(0, 1) for (-1, 1)": ((-1, 1), image(size=16)),
    "(0, 1) for (-0.5, 0.5)": ((-0.5, 0.5), image(size=16)),
    "(0, 255) for (-128, 128)": ((-128, 128), 255 * image(size=16)),
    "(0, 1) for (0, 255)": ((0, 255), image(size=16)),
    "(-1, 1) for (0, 255)": ((0, 255), 2 * image(size=16) - 1),
    "(0, 1) for HU": ((-1024, 3071), image(size=16)),
    "(0, 255) for 16 bits": ((0, 65535), 255 * image(size=16)),
    "(0, 255) for (0, 1)": ((0, 1), 255 * image(size=16)),
    "HU constant": ((0, 1), torch.full((2, 1, 8, 8), -1000.0)),
}


@pytest.mark.parametrize(("expects", "x"), WRONG.values(), ids=WRONG)
def test_images_of_another_convention_are_refused_at_once(expects, x) -> None:
    with pytest.raises(InputError, match=r"is expected; convert it with preprocess=..., or pass expects=None"):
        task(expects)(x, labels(x))


def test_an_image_that_shows_the_range_ends_the_looking_and_its_cost(monkeypatch) -> None:
    looks = []
    original = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t: looks.append(1) or original(t))
    loss = Fidelity(nn.MSELoss(), expects=(-1, 1))
    for x in (torch.zeros(1, 1, 4), 0.2 + 0.8 * torch.rand(1, 1, 99), 2 * torch.rand(1, 1, 99) - 1):
        loss(x, x)
    assert len(looks) == 3 and loss.check_range.settled
    loss(x, x)
    assert len(looks) == 3


def test_flat_patches_alone_are_looked_at_only_so_often() -> None:
    check = RangeCheck("t", (0, 1))
    for _ in range(99):
        check("t", torch.zeros(9))  # constant ones say nothing at all
    for _ in range(63):
        check("t", 0.5 + 0.01 * torch.rand(9))
    assert not check.settled
    check("t", 0.5 + 0.01 * torch.rand(9))
    assert check.settled


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_looking(clone) -> None:
    with pytest.raises(InputError, match="is expected"):
        clone(Fidelity(nn.MSELoss(), expects=(0, 1)))(torch.zeros(1, 1, 4), 99 * torch.rand(1, 1, 4) + 2)


@pytest.mark.parametrize("expects", [(1, 0), (0, 0), (0,), "0-1", 255, (None, 1)])
def test_a_range_is_two_numbers_in_order(expects) -> None:
    with pytest.raises(InputError, match=r"^task_oriented_loss: expects must be a range \(low, high\) or None, got"):
        task(expects)
