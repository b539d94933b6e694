"""Whatever a preprocess, network or criterion does, images and labels stay as they were, and draws are fair."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    InputError,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
    WassersteinCritic,
    gradient_maps,
)
from tests.properties import cross_entropy, image, labels, leaves_inputs_alone, segmenter


def normalise_(x):
    return x.sub_(0.5).div_(0.25)


class WritesOnItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Hardtanh(0.2, 0.8, inplace=True), nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.conv(self.first(x))


def relabels_(prediction, label):
    label[label == 1] = 0
    return F.cross_entropy(prediction, label)


def squared_(a, b):
    return a.sub_(b).square_().mean()


def writing_critic() -> WassersteinCritic:
    return WassersteinCritic(network=nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 1)))


WRITERS = {
    "task, preprocess": lambda: TaskOrientedLoss(segmenter(), cross_entropy, preprocess=normalise_),
    "task, network": lambda: TaskOrientedLoss(WritesOnItsInput(), cross_entropy),
    "task, two networks": lambda: TaskOrientedLoss([WritesOnItsInput(), segmenter()], cross_entropy),
    "task, criterion": lambda: TaskOrientedLoss(segmenter(), relabels_),
    "consistency, preprocess": lambda: TaskConsistencyLoss(segmenter(), nn.MSELoss(), preprocess=normalise_),
    "consistency, network": lambda: TaskConsistencyLoss(WritesOnItsInput(), nn.MSELoss()),
    "consistency, layers": lambda: TaskConsistencyLoss(WritesOnItsInput(), nn.MSELoss(), layers=["conv"]),
    "consistency, cached": lambda: TaskConsistencyLoss(segmenter(), squared_, cache=True),
    "fidelity, preprocess": lambda: Fidelity(nn.MSELoss(), preprocess=normalise_),
    "fidelity, criterion": lambda: Fidelity(squared_),
    "adversarial": lambda: AdversarialLoss(writing_critic()),
}


@pytest.mark.parametrize("make", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("leaf", [False, True], ids=["output", "leaf"])
def test_what_a_term_writes_on_is_a_copy(make, leaf) -> None:
    term = make()
    x, reference = image(), image()
    y = labels(x)
    x.requires_grad_(leaf)
    x_hat = x if leaf else 1 * x.requires_grad_()
    target = {"reference": (reference,), "label": (y,), None: ()}[term.reads]
    before, version = x_hat.detach().clone(), x_hat._version
    first = term(x_hat, *target)
    leaves_inputs_alone(lambda: term(x_hat, *target).backward(), *target)
    assert x.grad.any() and torch.equal(x_hat, before) and x_hat._version == version
    assert torch.equal(term(x_hat, *target), first), "the second call saw other numbers"


def test_a_critic_that_writes_on_its_input_leaves_the_images() -> None:
    critic = writing_critic()
    x, reference = image() - 0.5, image() - 0.5
    leaves_inputs_alone(lambda: critic.step(torch.optim.SGD(critic.parameters(), 0.1), x, reference), x, reference)


def test_a_term_of_the_callers_that_writes_is_refused_by_name() -> None:
    class Writes(Term):
        reads = "reference"

        def forward(self, x_hat, reference):
            return (x_hat - reference.mul_(2)).square().mean()

    with pytest.raises(
        InputError, match="mine: it writes on its reference in place, which the terms after it would see"
    ):
        LossSum(mine=Writes())(image(), reference=image())


# --- random draws ----------------------------------------------------------------------------------------------------

OWN = {"torch": torch.Generator(), "numpy": np.random.default_rng(0), "python": random.Random(0)}
DRAWS = {
    "torch": lambda: int(torch.randint(0, 4, ())),
    "numpy": lambda: np.random.randint(0, 4),
    "python": lambda: random.randrange(4),
    "torch of its own": lambda: int(torch.randint(0, 4, (), generator=OWN["torch"])),
    "numpy of its own": lambda: int(OWN["numpy"].integers(0, 4)),
    "python of its own": lambda: OWN["python"].randrange(4),
}


class WritesOnItsXHat(Term):
    """A caller's own term that halves what it is given."""

    reads = "reference"

    def forward(self, x_hat, reference):
        return x_hat.mul_(0.5).sub(reference).square().mean()


def compiled(loss):
    torch.compiler.reset()
    return torch.compile(loss, backend="aot_eager", fullgraph=True)


# Where nobody counts writes, a term that writes does it on a copy; elsewhere it is refused.
UNCOUNTED = {
    "compiled": lambda loss, x, r: torch.autograd.grad(compiled(loss)(x, reference=r), x)[0],
    "torch.func": lambda loss, x, r: torch.func.grad(lambda v: loss(v, reference=r))(x),
}


@pytest.mark.parametrize("gradient_of", UNCOUNTED.values(), ids=UNCOUNTED)
def test_a_term_that_writes_where_no_write_is_counted_does_it_on_a_copy(gradient_of) -> None:
    x, reference = image(), image()
    loss = LossSum(mine=WritesOnItsXHat(), mse=Fidelity(nn.MSELoss()))
    leaf = x.clone().requires_grad_()
    right = (0.5 * leaf - reference).square().mean() + F.mse_loss(leaf, reference)
    got = gradient_of(loss, x.clone().requires_grad_(), reference)
    torch.testing.assert_close(got, torch.autograd.grad(right, leaf)[0])


def test_a_term_that_writes_in_inference_mode_does_it_on_a_copy() -> None:
    loss = LossSum(mine=WritesOnItsXHat(), mse=Fidelity(nn.MSELoss()))
    with torch.inference_mode():
        x, reference = image(), image()
        before = x.clone()
        value = loss.breakdown(x, reference=reference)
        assert torch.equal(x, before) and torch.equal(value.terms["mse"], F.mse_loss(x, reference))


def test_a_term_that_writes_on_a_nest_of_labels_is_named() -> None:
    class Relabels(Term):
        reads = "label"

        def forward(self, x_hat, label):
            label["mask"].zero_()
            return x_hat.mean()

    x = image()
    with pytest.raises(InputError, match="mine: it writes on its label in place"):
        LossSum(mine=Relabels())(x, label={"mask": labels(x)})


def crop(draw):
    own = [g for name, g in OWN.items() if f"{name} of its own" in DRAWS and DRAWS[f"{name} of its own"] is draw]

    def function(x, generators=own):
        i = draw()
        return x[..., i : i + 3, i : i + 3]

    function.__defaults__ = (own[0],) if own else (None,)
    return function


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("kind", ["fidelity", "consistency", "cached"])
def test_both_images_of_a_comparison_see_the_same_draw(draw, kind) -> None:
    preprocess = crop(draw)
    if kind == "fidelity":
        term = Fidelity(nn.MSELoss(), preprocess=preprocess)
    else:
        term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), preprocess=preprocess, cache=kind == "cached")
    x = image()
    other = image()
    assert [term(x, x.clone()).item() for _ in range(8)] == [0.0] * 8
    assert len({round(term(x, other).item(), 6) for _ in range(16)}) > 1, "it draws only once for good"


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) if self.training else x


COMPILED_DRAWS = {
    "torch": lambda x: x * torch.rand_like(x),
    "python": lambda x: x * random.random(),
    "torch of its own": lambda x: x * torch.rand(x.shape, generator=OWN["torch"]),
    "numpy of its own": lambda x: x * float(OWN["numpy"].random()),
    "module": Noisy(),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, at a graph break
@pytest.mark.parametrize("preprocess", COMPILED_DRAWS.values(), ids=COMPILED_DRAWS)
@pytest.mark.parametrize("kind", ["fidelity", "consistency"])
def test_both_images_see_the_same_draw_when_compiled(preprocess, kind) -> None:
    term = Fidelity(squared_, preprocess=preprocess)
    if kind == "consistency":
        term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), preprocess=preprocess)
    torch.compiler.reset()
    compiled_term = torch.compile(term, backend="eager")
    x, other = image(), image()
    leaf = x.clone().requires_grad_()
    compiled_term(leaf, other).backward()
    assert leaf.grad.any()
    assert [compiled_term(x, x.clone()).item() for _ in range(3)] == [0.0] * 3
    values = [compiled_term(x, other).item() for _ in range(4)]
    assert len(set(values)) == (1 if kind == "fidelity" and preprocess is COMPILED_DRAWS["module"] else 4)


def test_a_preprocess_that_draws_nothing_is_compiled_with_the_rest() -> None:
    term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), preprocess=lambda x: x * 2 - 1)
    x, reference = image(), image()
    state = torch.get_rng_state()
    torch.testing.assert_close(compiled(term)(x, reference), term(x, reference))
    assert torch.equal(torch.get_rng_state(), state)


class OwnDraw:
    """A transform with a generator of its own, as MONAI's."""

    def __init__(self) -> None:
        self.R = np.random.RandomState(0)

    def draw(self, x):
        return x * float(self.R.uniform())

    __call__ = draw


class Composed:
    def __init__(self, *transforms) -> None:
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


SHARED_DRAW, COMPOSED = OwnDraw(), Composed(OwnDraw())
HOLDERS = {
    "composition": Composed(OwnDraw(), Composed(OwnDraw())),
    "function of a composition": lambda x, composed=COMPOSED: composed(x),
    "function of a global": lambda x: (SHARED_DRAW(x),)[0],
    "method": OwnDraw().draw,
    "module": nn.Sequential(nn.Identity()).append(nn.Identity()),
}
HOLDERS["module"][1].forward = OwnDraw()


@pytest.mark.parametrize("preprocess", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("twin", [lambda term: term, copy.deepcopy], ids=["itself", "copy"])
def test_generators_are_found_wherever_a_preprocess_keeps_them(preprocess, twin) -> None:
    term = twin(Fidelity(nn.MSELoss(), preprocess=preprocess))
    x = image()
    assert [term(x, x.clone()).item() for _ in range(4)] == [0.0] * 4
    assert len({term(x, 1 - x).item() for _ in range(4)}) > 1, "it draws only once for good"


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


@pytest.mark.parametrize("kind", ["task", "consistency", "fidelity"])
def test_a_generator_repeats_the_draws_and_leaves_the_global_state(kind) -> None:
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        if kind == "task":
            return TaskOrientedLoss(segmenter_(), cross_entropy, preprocess=Noise(), generator=generator)
        if kind == "consistency":
            return TaskConsistencyLoss(segmenter_(), squared, preprocess=noisy_and_python, generator=generator)
        return Fidelity(squared, preprocess=noisy_and_python, generator=generator)

    def segmenter_():
        torch.manual_seed(3)
        return segmenter()

    x, reference = image(), image()
    target = labels(x) if kind == "task" else reference
    first = [make(1)(x, target) for _ in range(1)] + [make(2)(x, target)]
    term = make(1)
    states = torch.get_rng_state(), random.getstate()
    again = [term(x, target), term(x, target)]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(again[0], again[1])


def squared(a, b):
    return (a - b**2).square().mean()


def noisy_and_python(x):
    return x + 0.1 * torch.randn_like(x) + random.random()


def test_looking_at_the_gradient_draws_nothing() -> None:
    loss = LossSum(
        task=TaskOrientedLoss(segmenter(), cross_entropy, preprocess=Noise(), generator=torch.Generator()),
        mse=Fidelity(nn.MSELoss(), preprocess=noisy_and_python),
    )
    x, reference = image(), image()
    y = labels(x)
    states = torch.get_rng_state(), random.getstate(), loss.terms["task"].preprocess.generator.get_state()
    first = gradient_maps(loss, x, reference=reference, label=y).maps
    second = gradient_maps(loss, x, reference=reference, label=y).maps
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.equal(states[2], loss.terms["task"].preprocess.generator.get_state())


# --- modules ---------------------------------------------------------------------------------------------------------


def test_a_module_augments_in_the_mode_it_came_in_while_the_loss_trains() -> None:
    x = image()
    y = labels(x)
    for given in (Noise(), nn.Sequential(nn.Dropout(0.5), Noise().eval())):
        before = [m.training for m in given.modules()]
        loss = TaskOrientedLoss(segmenter(), cross_entropy, preprocess=given)
        parent = nn.ModuleList([loss])
        assert loss(x, y) != loss(x, y)
        parent.eval()
        assert torch.equal(loss(x, y), loss(x, y))
        parent.train()
        assert loss(x, y) != loss(x, y)
        assert [m.training for m in given.modules()] == before
    resting = TaskOrientedLoss(segmenter(), cross_entropy, preprocess=Noise().eval())
    assert torch.equal(resting(x, y), resting(x, y))


def test_statistics_of_a_preprocess_do_not_move() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(1), Noise())
    loss = TaskOrientedLoss(segmenter(), cross_entropy, preprocess=norm)
    before = loss.preprocess.function.digest()
    loss(image(), labels(image()))
    assert loss.preprocess.function.digest() == before


def test_kornias_augmentations_draw_once_for_both_images() -> None:
    kornia = pytest.importorskip("kornia.augmentation")
    augment = kornia.AugmentationSequential(kornia.RandomHorizontalFlip(p=0.5), kornia.RandomAffine(30.0))
    term = TaskConsistencyLoss(segmenter(), nn.MSELoss(), preprocess=augment)
    x, reference = image(), image()
    assert [term(x, x.clone()).item() for _ in range(4)] == [0.0] * 4
    assert len({round(term(x, reference).item(), 6) for _ in range(8)}) > 1
