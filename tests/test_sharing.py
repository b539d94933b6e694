"""Terms that look through one frozen network at one image run it once; nobody can tell but by the time."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloss import (
    Fidelity,
    Frozen,
    GradientBalancer,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
    gradient_maps,
    soft_kl,
)
from tests.properties import image, labels, soft_dice

HOW = {"lean": {}, "stored": {"lean": False}, "checkpointed": {"checkpoint": True}}
hows = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


class Counted(nn.Module):
    """Counts its forward passes, and remembers its last output without keeping it."""

    def __init__(self, inplace: bool = False, log: list[bool] | None = None) -> None:
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)
        self.b = nn.Conv2d(4, 2, 1)
        self.log = [] if log is None else log

    def __deepcopy__(self, memo) -> "Counted":
        twin = type(self)(self.act.inplace, self.log)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(torch.is_grad_enabled())
        return self.b(self.act(self.norm(self.a(x))))


def scene():
    x = image()
    return x.requires_grad_(), torch.rand_like(x), labels(x)


def terms(frozen: Frozen, **more) -> dict[str, Term]:
    return {
        "task": TaskOrientedLoss(frozen, nn.CrossEntropyLoss(), **more),
        "dice": TaskOrientedLoss(frozen, soft_dice, **more),
        "seen": TaskConsistencyLoss(frozen, soft_kl, **more),
        "inside": TaskConsistencyLoss(frozen, nn.MSELoss(), layers=["act", "a"], **more),
        "mse": Fidelity(nn.MSELoss()),
    }


def alone(term: Term, x: Tensor, reference: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """A term's value and its gradient at x, without a sum around it."""
    value = term(x, label if term.reads == "label" else reference)
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_as_alone(found: dict[str, Term], x: Tensor, reference: Tensor, label: Tensor, **tolerance: float) -> None:
    value = LossSum(**found).breakdown(x, reference=reference, label=label)
    expected = {name: alone(term, x, reference, label) for name, term in found.items()}
    for name, (each, _) in expected.items():
        assert torch.equal(value.terms[name], each), name
    (gradient,) = torch.autograd.grad(value.total, x)
    torch.testing.assert_close(gradient, sum(g for _, g in expected.values()), **tolerance)


@hows
def test_a_sum_runs_the_network_once_for_each_image(how) -> None:
    net = Counted()
    loss = LossSum(**terms(Frozen(net, **how)))
    x, reference, label = scene()
    loss(x, reference=reference, label=label)
    net.log.clear()  # checkpointing looks once at the first call
    loss(x, reference=reference, label=label)
    assert sorted(net.log) == [False, True]  # the reference without a graph, x_hat with one
    with torch.no_grad():
        loss(x, reference=reference, label=label)
    assert len(net.log) == 4


@hows
def test_values_are_equal_to_the_bit_and_gradients_to_rounding(how) -> None:
    assert_as_alone(terms(Frozen(Counted(), **how)), *scene())


@hows
def test_maps_run_it_once_forward_and_are_equal_to_the_bit(how) -> None:
    net = Counted()
    x, reference, label = scene()
    found = terms(Frozen(net, **how))
    found["task"](x, label)
    net.log.clear()  # checkpointing looks once at the first call
    maps = gradient_maps(LossSum(**found), x, reference=reference, label=label).maps
    recomputed = 4 if how.get("checkpoint") else 0
    assert len(net.log) == 2 + recomputed
    for name, term in found.items():
        assert torch.equal(maps[name], alone(term, x, reference, label)[1]), name


def test_a_balancer_runs_it_once_forward_and_gives_the_same_step() -> None:
    net = Counted()
    x, reference, label = scene()
    steps = []
    for found in (terms(Frozen(net)), {name: term for frozen in [net] for name, term in terms(frozen).items()}):
        x.grad = None
        net.log.clear()
        balancer = GradientBalancer(LossSum(**found), shares=dict.fromkeys(found, 1.0))
        value = balancer.backward(x, reference=reference, label=label)
        steps.append((value.total, x.grad.clone(), len(net.log)))
    (total, gradient, n), (total_apart, gradient_apart, n_apart) = steps
    assert (n, n_apart) == (2, 6)  # each of the second terms has a copy of its own
    assert torch.equal(total, total_apart) and torch.equal(gradient, gradient_apart)


def test_nothing_that_was_seen_is_kept() -> None:
    outputs = []
    frozen = Frozen(Counted())
    frozen.network.b.register_forward_hook(lambda _m, _x, y: outputs.append(weakref.ref(y)))
    loss = LossSum(**terms(frozen))
    x, reference, label = scene()
    with torch.no_grad():
        loss(x, reference=reference, label=label)
    assert len(outputs) == 2 and not any(output() is not None for output in outputs)
    value = loss(x, reference=reference, label=label)
    value.backward()
    del value
    gradient_maps(loss, x, reference=reference, label=label)
    gc.collect()
    assert len(outputs) == 6 and not any(output() is not None for output in outputs)


def halved(x: Tensor, by: float = 2.0) -> Tensor:
    return x / by


class Units:
    def scaled(self, x: Tensor) -> Tensor:
        return x * 3


units, third = Units(), partial(halved, by=3.0)


@pytest.mark.parametrize(
    ("one", "other", "n"),
    [
        (None, None, 1),
        (halved, halved, 1),
        (third, third, 1),
        (units.scaled, units.scaled, 1),
        (None, halved, 2),
        (halved, third, 2),
        (units.scaled, Units().scaled, 2),
    ],
    ids=["none", "function", "partial", "method", "one of them", "two functions", "two objects"],
)
def test_only_the_same_preprocess_is_shared(one, other, n) -> None:
    net = Counted()
    frozen = Frozen(net)
    x, reference, label = scene()
    found = {
        "task": TaskOrientedLoss(frozen, nn.CrossEntropyLoss(), preprocess=one),
        "seen": TaskConsistencyLoss(frozen, soft_kl, preprocess=other),
    }
    LossSum(**found)(x, reference=reference, label=label)
    assert sum(net.log) == n
    assert_as_alone(found, x, reference, label)


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def test_a_random_preprocess_draws_once_for_all_and_nothing_twice() -> None:
    net = Counted()
    frozen = Frozen(net)
    drawn = []

    class Draws(Term):
        def forward(self, x_hat: Tensor) -> Tensor:
            drawn.append(torch.rand(()))
            return x_hat.mean()

    more = {"preprocess": noisy}
    loss = LossSum(
        task=TaskOrientedLoss(frozen, nn.CrossEntropyLoss(), **more),
        draws=Draws(),
        seen=TaskConsistencyLoss(frozen, soft_kl, **more),
        after=Draws(),
    )
    x, _, label = scene()
    value = loss.breakdown(x, reference=x.detach(), label=label)
    assert float(value.terms["seen"].detach()) == 0  # the reference, which is x_hat, saw the same noise
    assert sum(net.log) == 1
    assert drawn[0] != drawn[1]  # the noise was drawn again for the reference, and what came between was not


def test_a_term_that_writes_on_what_it_sees_writes_on_a_copy() -> None:
    def rough(prediction: Tensor, label: Tensor) -> Tensor:
        return prediction.sigmoid_().mean()

    def erased(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.mul_(0) - target.zero_()).square().mean()

    frozen = Frozen(Counted())
    assert_as_alone(
        {
            "rough": TaskOrientedLoss(frozen, rough),
            "erased": TaskConsistencyLoss(frozen, erased, layers=["a"]),
            "output": TaskOrientedLoss(frozen, nn.CrossEntropyLoss(), output=lambda y: y.mul_(2)),
            "seen": TaskConsistencyLoss(frozen, soft_kl),
        },
        *scene(),
    )


@hows
def test_a_layer_that_is_overwritten_further_on_is_looked_at_alone(how) -> None:
    net = Counted(inplace=True)
    frozen = Frozen(net, **how)
    found = {
        "task": TaskOrientedLoss(frozen, nn.CrossEntropyLoss()),
        "inside": TaskConsistencyLoss(frozen, nn.MSELoss(), layers=["norm"]),
    }
    x, reference, label = scene()
    for _ in range(2):
        assert_as_alone(found, x, reference, label)
    net.log.clear()
    LossSum(**found)(x, reference=reference, label=label)
    assert sum(net.log) == 2  # it is known by now, and not tried again


def test_samples_without_a_label_are_left_out_of_the_task_alone() -> None:
    net = Counted()
    x, reference, label = scene()
    label[0] = -1
    frozen = Frozen(net)
    found = {
        "task": TaskOrientedLoss(frozen, nn.CrossEntropyLoss(), missing=-1),
        "inside": TaskConsistencyLoss(frozen, nn.MSELoss(), layers=["a"]),
        "act": TaskConsistencyLoss(frozen, nn.MSELoss(), layers=["act"]),
    }
    assert_as_alone(found, x, reference, label)
    net.log.clear()
    LossSum(**found)(x, reference=reference, label=label)
    assert sum(net.log) == 2


def test_an_ensemble_shares_the_network_whose_turn_it_is() -> None:
    nets = [Counted(), Counted()]
    first, second = (Frozen(net) for net in nets)
    loss = LossSum(
        task=TaskOrientedLoss([first, second], nn.CrossEntropyLoss(), ensemble="turns"),
        seen=TaskConsistencyLoss(second, soft_kl),
    )
    x, reference, label = scene()
    counts = []
    for _ in range(2):
        loss(x, reference=reference, label=label)
        counts.append([sum(net.log) for net in nets])
    assert counts == [[1, 1], [1, 2]]
    mean = TaskOrientedLoss([first, second], nn.CrossEntropyLoss())
    assert_as_alone({"task": mean, "seen": TaskConsistencyLoss(second, soft_kl)}, x, reference, label)


def test_other_switches_are_other_looks() -> None:
    net = Counted()
    loose = Frozen(net, copy=False)
    tight = Frozen(net, copy=False, lean=False)
    x, _, label = scene()
    for other, n in ((loose, 1), (tight, 2), (Frozen(net), 2)):
        net.log.clear()
        both = (TaskOrientedLoss(frozen, F.cross_entropy) for frozen in (loose, other))
        LossSum(**dict(zip("ab", both, strict=True)))(x, label=label)
        assert len(net.log) == n


def test_a_look_without_a_gradient_is_not_one_with_it() -> None:
    frozen = Frozen(Counted())
    task = TaskOrientedLoss(frozen, nn.CrossEntropyLoss())

    class Scaled(Term):
        reads = "label"

        def forward(self, x_hat: Tensor, label: Tensor) -> Tensor:
            with torch.no_grad():
                scale = task(x_hat, label)
            return scale * task(x_hat, label)

    x, reference, label = scene()
    assert_as_alone(
        {"scaled": Scaled(), "task": task, "seen": TaskConsistencyLoss(frozen, soft_kl)}, x, reference, label
    )


def test_under_autocast_and_in_half_precision() -> None:
    x, reference, label = scene()
    found = terms(Frozen(Counted()))
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_alone(found, x, reference, label, rtol=0.03, atol=1e-4)
    half = {name: term.to(torch.bfloat16) for name, term in terms(Frozen(Counted())).items()}
    maps = gradient_maps(LossSum(**half), x.bfloat16(), reference=reference.bfloat16(), label=label)
    assert all(bool(g.any()) for g in maps.maps.values())


def test_two_threads_share_nothing() -> None:
    loss = LossSum(**terms(Frozen(Counted())))
    scenes = [scene() for _ in range(2)]
    expected = [loss(x, reference=reference, label=label).detach() for x, reference, label in scenes]
    wrong = []

    def work(i: int) -> None:
        x, reference, label = scenes[i]
        for _ in range(20):
            value = loss(x, reference=reference, label=label)
            value.backward()
            if not torch.equal(value.detach(), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_ends_the_step() -> None:
    frozen = Frozen(Counted())
    loss = LossSum(task=TaskOrientedLoss(frozen, nn.CrossEntropyLoss()), seen=TaskConsistencyLoss(frozen, soft_kl))
    x, reference, label = scene()
    with pytest.raises(ValueError, match="has 3 channels"):
        loss(x.expand(-1, 3, -1, -1), reference=reference.expand(-1, 3, -1, -1), label=label)
    loss(x, reference=reference, label=label).backward()
    assert x.grad.any()
