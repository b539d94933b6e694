"""The losses inside other people's training: autocast, compile, checkpointing, accumulation, scalers, modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taskloss import (
    AdversarialLoss,
    Fidelity,
    Frozen,
    GradientBalancer,
    GradientPenalty,
    LossSum,
    LossValue,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
    WassersteinCritic,
    WeightClipping,
    gradient_maps,
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


# --- precision -------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A task network without weights, so that it runs in whatever precision it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def dice_of_probabilities(p: Tensor, g: Tensor) -> Tensor:
    return 1 - (2 * (p * g).sum()) / (p.sum() + g.sum())


half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@half_types
@pytest.mark.parametrize("label_too", [False, True], ids=["label-float32", "label-half"])
def test_dice_over_four_million_voxels_is_finite_and_that_of_float32(dtype: torch.dtype, label_too: bool) -> None:
    x = torch.rand(1, 1, 160, 160, 160) / 2
    label = (x > 0.25).float()
    task = TaskOrientedLoss(Doubled(), dice_of_probabilities)
    exact = float(task(x, label))
    x_half = x.to(dtype).requires_grad_()
    value = task(x_half, label.to(dtype) if label_too else label)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(
        exact, abs=1e-4
    )  # what rounding the voxels themselves costs, and no more
    assert x_half.grad.dtype == dtype
    assert x_half.grad.isfinite().all()
    if dtype == torch.float16:
        naive = float(dice_of_probabilities(2 * x.half(), label.half()))
        assert not abs(naive - exact) < 0.1, "else the test shows nothing"


@half_types
@pytest.mark.parametrize("dims", [2, 3])
def test_under_autocast_a_dice_loss_is_that_of_the_half_precision_prediction_in_float32(
    dims: int, dtype: torch.dtype
) -> None:
    net = segmenter(dims)
    x = torch.rand(2, 1, *(8,) * dims)
    label = torch.randint(0, 2, (2, *(8,) * dims))
    with torch.autocast("cpu", dtype):
        prediction = Frozen(net)(x)
        value = TaskOrientedLoss(net, soft_dice)(x, label)
    assert prediction.dtype == dtype, "the network itself runs under the caller's autocast"
    assert torch.equal(value, soft_dice(prediction.float(), label))
    torch.testing.assert_close(value, TaskOrientedLoss(net, soft_dice)(x, label), atol=1e-2, rtol=0)


class Spy(nn.Module):
    """A criterion that notes the precision it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = a.flatten(1) @ a.flatten(1).T  # autocast would make this a half-precision product
        self.seen.append((a.dtype, b.dtype, product.dtype, torch.is_autocast_enabled("cpu")))
        return (a - b).square().mean()


@pytest.mark.parametrize(
    "build",
    [
        lambda spy: TaskOrientedLoss(nn.Conv2d(1, 1, 1), spy),
        lambda spy: TaskConsistencyLoss(nn.Conv2d(1, 1, 1), spy),
        lambda spy: TaskConsistencyLoss(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), spy, layers=["0", "1"]),
        lambda spy: Fidelity(spy),
    ],
    ids=["task", "consistency", "consistency-at-layers", "fidelity"],
)
def test_under_autocast_every_criterion_runs_in_float32(build: Callable[[Callable[..., Tensor]], Term]) -> None:
    spy = Spy()
    term = build(lambda a, b: spy(a, b))
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = nn.Conv2d(1, 1, 1)(torch.rand(2, 1, 8, 8))
        term(x_hat, torch.rand(2, 1, 8, 8).bfloat16()).backward()
    assert x_hat.dtype == torch.bfloat16
    assert set(spy.seen) == {(torch.float32, torch.float32, torch.float32, False)}


Heads = namedtuple("Heads", ["out", "aux"])

CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda out, aux: {"out": out, "aux": aux},
    "ordered-dict": lambda out, aux: OrderedDict(out=out, aux=aux),
    "defaultdict": lambda out, aux: defaultdict(list, out=out, aux=aux),
    "list": lambda out, aux: [out, aux],
    "tuple": lambda out, aux: (out, aux),
    "named-tuple": lambda out, aux: Heads(out, aux),
    "nested": lambda out, aux: {"heads": [out, (aux,)]},
}


class Answers(nn.Module):
    """A task network that answers with a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container
        self.body = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.container(self.body(x), 2 * self.body(x))


@pytest.mark.parametrize("name", CONTAINERS)
def test_under_autocast_every_tensor_of_an_answer_reaches_the_criterion_in_float32(name: str) -> None:
    seen: list[Any] = []

    def criterion(answer: Any, label: Tensor) -> Tensor:
        seen.append(answer)
        leaves = tree_leaves(dict(answer) if isinstance(answer, defaultdict) else answer)
        assert [leaf.dtype for leaf in leaves] == [torch.float32] * 2
        return sum((leaf - label).square().mean() for leaf in leaves)

    term = TaskOrientedLoss(Answers(CONTAINERS[name]), criterion)
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        term(x, torch.zeros(2, 1, 4, 4)).backward()
    assert x.grad.any()
    if name != "defaultdict":
        assert type(seen[0]) is type(CONTAINERS[name](x, x))


def test_a_whole_step_under_autocast_is_close_to_that_of_float32() -> None:
    low, reference, label = x_reference_label()
    critic = small_critic(GradientPenalty(10.0))
    loss = tod_net_loss(critic)
    denoiser = nn.Conv2d(1, 1, 3, padding=1)
    gradients = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss.breakdown(denoiser(low), reference=reference, label=label)
            scores = critic.breakdown(denoiser(low), reference)
        assert value.total.dtype == torch.float32
        assert scores.total.dtype == torch.float32
        gradients[enabled] = torch.autograd.grad(value.total, list(denoiser.parameters()))
    for half, full in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(half, full, atol=2e-3, rtol=5e-2)


def test_features_remembered_under_autocast_are_not_used_outside_it() -> None:
    term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), cache=True)
    reference = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(term(reference, reference)) == 0
    assert float(term(reference, reference)) == 0


# --- torch.compile ---------------------------------------------------------------------------------------------------


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


# --- activation checkpointing ----------------------------------------------------------------------------------------


class UNet3d(nn.Module):
    """Two levels of a 3-D U-Net, with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*self._block(1, 8), *self._block(8, 8))
        self.bottom = nn.Sequential(nn.MaxPool3d(2), *self._block(8, 16), nn.Dropout3d(0.5), *self._block(16, 16))
        self.up = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.head = nn.Sequential(*self._block(16, 8), nn.Conv3d(8, 2, 1))

    @staticmethod
    def _block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.bottom(skip))], 1))


def bytes_saved(compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A value, and the bytes that its graph keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = compute()
    return value, sum(kept.values())


@pytest.mark.parametrize("kind", ["task", "consistency", "consistency-at-layers"])
def test_checkpointing_a_3d_unet_keeps_fewer_bytes_and_the_same_gradient(kind: str) -> None:
    net = UNet3d()
    reference, label = torch.rand(1, 1, 16, 16, 16), torch.randint(0, 2, (1, 16, 16, 16))
    layers = ["down", "bottom"] if kind.endswith("layers") else None
    gradients, kept = [], []
    for checkpoint in (False, True):
        if kind == "task":
            term, target = TaskOrientedLoss(net, soft_dice, checkpoint=checkpoint, lean=False), label
        else:
            term = TaskConsistencyLoss(net, nn.MSELoss(), layers=layers, checkpoint=checkpoint, lean=False)
            target = reference
        x = torch.full((1, 1, 16, 16, 16), 0.5).requires_grad_()
        rng = torch.get_rng_state()
        value, n_bytes = bytes_saved(lambda term=term, x=x, target=target: term(x, target))
        value.backward()
        assert torch.equal(rng, torch.get_rng_state())
        gradients.append(x.grad)
        kept.append(n_bytes)
    assert torch.equal(*gradients)
    share = 1 / 2 if layers else 2 / 5  # what the pieces take in; the distance keeps the named layers themselves
    assert kept[1] < share * kept[0], f"{kept[1]:,} against {kept[0]:,} bytes"


def test_checkpointing_works_under_autocast() -> None:
    net, (x, _, label) = segmenter(), x_reference_label()
    gradients = []
    for checkpoint in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = TaskOrientedLoss(net, soft_dice, checkpoint=checkpoint)(leaf, label)
        value.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# --- accumulation and scalers ----------------------------------------------------------------------------------------


def test_gradients_of_half_batches_accumulate_to_that_of_the_batch() -> None:
    low, reference, label = (t.repeat(2, *(1,) * (t.dim() - 1)) for t in x_reference_label())
    low = low + 0.1 * torch.randn_like(low)
    critic, denoiser = small_critic(), nn.Conv2d(1, 1, 3, padding=1)
    loss = LossSum(
        adv=AdversarialLoss(critic), task=TERMS["task"](), see=TERMS["consistency"](), mse=Fidelity(nn.MSELoss())
    )
    loss(denoiser(low), reference=reference, label=label).backward()
    expected = [p.grad.clone() for p in denoiser.parameters()]
    denoiser.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        value = loss(denoiser(low[part]), reference=reference[part], label=label[part])
        (value / 2).backward()
    for parameter, gradient in zip(denoiser.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_a_balancer_accumulates_like_backward(decay: float) -> None:
    low, reference, label = x_reference_label()
    loss, denoiser = tod_net_loss(small_critic()), nn.Conv2d(1, 1, 3, padding=1)
    balancer = GradientBalancer(loss, shares=dict.fromkeys(loss.weights, 1.0), decay=decay)
    balancer.backward(denoiser(low), reference=reference, label=label)
    once = [p.grad.clone() for p in denoiser.parameters()]
    balancer.backward(denoiser(low), reference=reference, label=label)
    for parameter, gradient in zip(denoiser.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)  # the same batch: the same norms, the same gradient


def scaled(scaler: torch.amp.GradScaler) -> Callable[[Tensor], None]:
    return lambda value: scaler.scale(value).backward()


@pytest.mark.parametrize("kind", ["shares", "aggregator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_balancer_through_a_grad_scaler_gives_the_direct_gradient(kind: str, dtype: torch.dtype) -> None:
    low, reference, label = x_reference_label()
    low, reference = low.to(dtype), reference.to(dtype)
    critic = small_critic().to(dtype)
    loss, denoiser = tod_net_loss(critic).to(dtype), nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    how = (
        {"shares": dict.fromkeys(loss.weights, 1.0)} if kind == "shares" else {"aggregator": lambda rows: rows.mean(0)}
    )
    direct = GradientBalancer(loss, **how).backward(denoiser(low), reference=reference, label=label)
    expected = [p.grad.clone() for p in denoiser.parameters()]
    optimizer.zero_grad()
    surrogate = GradientBalancer(loss, **how).backward(
        denoiser(low), reference=reference, label=label, backward=scaled(scaler)
    )
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(denoiser.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert surrogate.weights == direct.weights


@pytest.mark.parametrize("constraint", [WeightClipping(0.05), GradientPenalty(10.0)], ids=["clip", "penalty"])
def test_a_critic_step_through_a_scaler_that_unscales_is_the_direct_step(constraint: Any) -> None:
    x, reference, _ = x_reference_label()
    weights, through_the_scaler = [], []
    start = small_critic(constraint)
    for kind in ("direct", "scaled"):
        critic = copy.deepcopy(start)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def backward(value: Tensor, scaler: Any = scaler, optimizer: Any = optimizer) -> None:
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            through_the_scaler.append(float(value.detach()))

        torch.manual_seed(3)  # for the penalty's alpha
        critic.step(optimizer, x, reference, backward=None if kind == "direct" else backward)
        weights.append(nn.utils.parameters_to_vector(critic.parameters()))
    assert len(through_the_scaler) == 1
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[0], nn.utils.parameters_to_vector(start.parameters()))


def test_a_half_precision_x_hat_takes_a_balanced_gradient_in_its_own_type() -> None:
    low, reference, label = x_reference_label()
    loss, denoiser = tod_net_loss(small_critic()), nn.Conv2d(1, 1, 3, padding=1)
    balancer = GradientBalancer(loss, shares=dict.fromkeys(loss.weights, 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        x_hat = denoiser(low)
        value = balancer.backward(x_hat, reference=reference, label=label)
    assert x_hat.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.any() for p in denoiser.parameters())
    assert value.total.isfinite()


# --- inside a parent module ------------------------------------------------------------------------------------------


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


# --- evaluation ------------------------------------------------------------------------------------------------------

no_graph = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference-mode"])


@no_graph
@every_term
def test_a_term_is_the_same_without_a_graph_and_trains_afterwards(
    build: Callable[[], Term], mode: Callable[[], Any]
) -> None:
    term = build()
    x, reference, label = x_reference_label()
    target = target_of(term, reference, label)
    expected = term(x, *target)
    fresh = copy.deepcopy(term)
    for subject in (term, fresh):  # with and without anything remembered from training
        with mode():
            value = subject(x.clone(), *target)
        assert not value.requires_grad
        assert torch.equal(value, expected)
        leaf = x.clone().requires_grad_()
        subject(leaf, *target).backward()
        assert leaf.grad.isfinite().all()


@no_graph
def test_a_sum_is_evaluated_and_logged_without_a_graph(mode: Callable[[], Any]) -> None:
    critic = small_critic()
    loss = tod_net_loss(critic)
    x, reference, label = x_reference_label()
    expected = loss.breakdown(x, reference=reference, label=label).floats("val/")
    with mode():
        value = loss.breakdown(x, reference=reference, label=label)
        assert value.floats("val/") == expected
        assert float(critic.distance(x, reference)) == pytest.approx(
            float(critic(reference).mean() - critic(x).mean()), abs=1e-6
        )
        assert loss.terms["task"].predict(x).shape == (2, 2, 8, 8)


def test_gradient_maps_can_be_drawn_during_a_validation_without_gradients() -> None:
    loss = tod_net_loss(small_critic())
    x, reference, label = x_reference_label()
    expected = gradient_maps(loss, x, reference=reference, label=label)
    with torch.no_grad():
        maps = gradient_maps(loss, x, reference=reference, label=label)
    for name, gradient in expected.maps.items():
        assert torch.equal(maps.maps[name], gradient)


# --- a whole game ----------------------------------------------------------------------------------------------------


def test_the_documented_loop_trains_the_denoiser_and_the_critic_and_nothing_else() -> None:
    critic, denoiser = small_critic(), nn.Conv2d(1, 1, 3, padding=1)
    loss = tod_net_loss(critic)
    digests = [m.digest() for m in loss.modules() if isinstance(m, Frozen)]
    opt_d = torch.optim.RMSprop(critic.parameters(), lr=1e-2)
    opt_g = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    reference, label = torch.rand(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    low = reference + 0.3 * torch.randn_like(reference)
    before = F.mse_loss(denoiser(low), reference).item()
    start = [p.detach().clone() for p in critic.parameters()]
    for _ in range(30):
        x_hat = denoiser(low)
        critic.step(opt_d, x_hat.detach(), reference)
        value = loss.breakdown(x_hat, reference=reference, label=label)
        opt_g.zero_grad()
        value.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())
        opt_g.step()
    assert F.mse_loss(denoiser(low), reference).item() < before / 2
    assert any(not torch.equal(a, b) for a, b in zip(start, critic.parameters(), strict=True))
    assert [m.digest() for m in loss.modules() if isinstance(m, Frozen)] == digests
