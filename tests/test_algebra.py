"""A sum of named terms: linear, routed, logged, and blamed by name."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taskloss import AdversarialLoss, Fidelity, InputError, LossSum, TaskOrientedLoss, Term, WassersteinCritic
from tests.properties import cross_entropy, image, labels, leaves_inputs_alone, segmenter

WEIGHTS = st.floats(-3, 3, allow_subnormal=False)


def mse() -> Fidelity:
    return Fidelity(nn.MSELoss())


def l1() -> Fidelity:
    return Fidelity(nn.L1Loss())


def full_sum() -> LossSum:
    critic = WassersteinCritic(spatial_dims=2, patch_size=(6, 6), channels=(2, 2, 2))
    return LossSum(
        adv=AdversarialLoss(critic), task=TaskOrientedLoss(segmenter(), cross_entropy), mse=0.5 * Fidelity(nn.MSELoss())
    )


@settings(max_examples=25, deadline=None)
@given(a=WEIGHTS, b=WEIGHTS)
def test_linear_in_its_weights_in_value_and_gradient(a, b) -> None:
    x, reference = image().requires_grad_(), image()
    (expected,) = torch.autograd.grad(a * mse()(x, reference) + b * l1()(x, reference), x)
    value = LossSum(m=a * mse(), l=b * l1())(x, reference=reference)
    torch.testing.assert_close(value, a * mse()(x, reference) + b * l1()(x, reference))
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, expected)


def test_breakdown_is_the_same_computation_seen_whole() -> None:
    loss = full_sum()
    x, reference = image(), image()
    y = labels(x)
    value = loss.breakdown(x, reference=reference, label=y)
    assert torch.equal(value.total, loss(x, reference=reference, label=y))
    assert list(value.terms) == ["adv", "task", "mse"]
    assert value.weights == {"adv": 1.0, "task": 1.0, "mse": 0.5}
    torch.testing.assert_close(value.total, sum(w * value.terms[n] for n, w in value.weights.items()))
    torch.testing.assert_close(value.terms["mse"], nn.functional.mse_loss(x, reference)), "terms are unweighted"


def test_floats_are_plain_numbers_under_a_prefix() -> None:
    x, reference = image(), image()
    y = labels(x)
    value = full_sum().breakdown(x, reference=reference, label=y)
    numbers = value.floats("g/")
    assert list(numbers) == ["g/adv", "g/task", "g/mse", "g/total"]
    assert all(type(n) is float for n in numbers.values())
    assert numbers["g/total"] == pytest.approx(float(value.total))


def test_one_breakdown_and_its_floats_cost_one_transfer(monkeypatch) -> None:
    transfers = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, name=name: transfers.append(name) or original(self)
        )
    x, reference = image(), image()
    loss = LossSum(m=mse(), l=l1(), task=TaskOrientedLoss(segmenter(), cross_entropy))
    y = labels(x)
    value = loss.breakdown(x, reference=reference, label=y)
    value.floats()
    value.floats("again/")
    assert transfers == ["tolist"]
    loss.check_finite = False
    loss.breakdown(x, reference=reference, label=y)
    assert transfers == ["tolist"], "without the check there is none"


def test_operators_are_shorthand_with_snake_case_names() -> None:
    loss = TaskOrientedLoss(segmenter(), cross_entropy) + 0.5 * mse()
    assert loss.weights == {"task_oriented_loss": 1.0, "fidelity": 0.5}
    assert (2 * loss).weights == (loss * 2).weights == {"task_oriented_loss": 2.0, "fidelity": 1.0}
    assert loss.weights == {"task_oriented_loss": 1.0, "fidelity": 0.5}, "operators change their operands"


def test_sums_nest_by_name() -> None:
    inner = LossSum(a=mse(), b=2 * l1())
    assert LossSum(image=0.5 * inner, mse=3 * mse()).weights == {"image/a": 0.5, "image/b": 1.0, "mse": 3.0}


class TestPositionalTarget:
    """``loss(x_hat, target)``, as MONAI, ignite and many a trainer call it."""

    @pytest.mark.parametrize("reads", ["reference", "label"])
    def test_it_goes_to_the_one_kind_that_the_terms_read(self, reads) -> None:
        x = image()
        target = image() if reads == "reference" else labels(x)
        critic = WassersteinCritic(spatial_dims=2, patch_size=(6, 6), channels=(2, 2, 2))
        term = mse() if reads == "reference" else TaskOrientedLoss(segmenter(), cross_entropy)
        loss = LossSum(adv=AdversarialLoss(critic), it=term)
        assert torch.equal(loss(x, target), loss(x, **{reads: target}))
        assert torch.equal(loss.breakdown(x, target).total, loss(x, target))

    def test_a_dict_with_both_keys_is_read_by_name_whatever_the_terms_read(self) -> None:
        x, reference = image(), image()
        both = {"reference": reference, "label": labels(x)}
        for loss in (full_sum(), LossSum(mse=mse())):
            assert torch.equal(loss(x, both), loss(x, **both))

    def test_where_the_terms_read_both_kinds_it_could_be_either(self) -> None:
        loss = full_sum() + 0 * LossSum(off=mse())
        with pytest.raises(InputError, match=r"one positional target could be either; call loss\(x_hat, reference="):
            loss(image(), image())

    def test_it_is_not_mixed_with_named_ones(self) -> None:
        x = image()
        with pytest.raises(InputError, match=r"got a positional target and a named one; call loss\(x_hat, reference="):
            full_sum()(x, image(), label=labels(x))

    def test_none_is_no_target(self) -> None:
        with pytest.raises(InputError, match="mse: needs a reference"):
            LossSum(mse=mse())(image(), None)


def test_a_sum_from_plain_dicts() -> None:
    loss = LossSum.weighted({"mse": mse(), "both": 2 * LossSum(a=l1(), b=mse())}, {"mse": 0.5, "both": 3})
    assert loss.weights == {"mse": 0.5, "both/a": 6.0, "both/b": 6.0}
    assert LossSum.weighted({"mse": mse()}).weights == {"mse": 1.0}
    with pytest.raises(InputError, match="there is no term 'mes'; did you mean 'mse'"):
        LossSum.weighted({"mse": mse()}, {"mes": 0.5})


def test_two_terms_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two terms are called 'fidelity'; name them: LossSum\(a=..., b=...\)"):
        mse() + l1()


def test_a_zero_weight_is_not_computed_and_needs_no_target() -> None:
    class Never(Term):
        reads = "label"

        def forward(self, x_hat, label):
            raise AssertionError("computed")

    loss = LossSum(mse=mse(), never=0 * Never())
    x, reference = image(), image()
    value = loss.breakdown(x, reference=reference)
    assert list(value.terms) == ["mse"] and value.weights == {"mse": 1.0, "never": 0.0}


def test_a_sum_without_active_terms_is_a_zero_that_back_propagates() -> None:
    x = image().requires_grad_()
    value = (0 * mse())(x)
    value.backward()
    assert value == 0 and torch.equal(x.grad, torch.zeros_like(x))


def ramp(step: int, length: int = 100) -> float:
    return min(1.0, step / length)


class TestSchedules:
    def setup_method(self) -> None:
        self.loss = LossSum(mse=mse(), l1=(2 * l1()) * partial(ramp, length=10))

    def test_follow_the_step(self) -> None:
        assert self.loss.weights_at(5) == {"mse": 1.0, "l1": 1.0}
        x, reference = image(), image()
        value = self.loss.breakdown(x, reference=reference, step=0)
        assert list(value.terms) == ["mse"] and value.weights["l1"] == 0

    def test_survive_products_and_pickling(self) -> None:
        twice = pickle.loads(pickle.dumps(0.5 * self.loss))
        assert twice.weights_at(20) == {"mse": 0.5, "l1": 1.0}

    def test_without_a_step_are_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"l1: its weight is a schedule, but step is None; call loss\(x_hat, .*step=i"
        ):
            self.loss(image(), reference=image())

    def test_that_are_not_finite_are_refused(self) -> None:
        loss = LossSum(mse=mse() * (lambda step: float("nan")))
        with pytest.raises(InputError, match="mse: its weight must be a finite number .* got nan"):
            loss(image(), reference=image(), step=0)


@pytest.mark.parametrize("missing", ["label", "reference"])
def test_a_missing_target_names_the_term(missing) -> None:
    x, reference = image(), image()
    targets = {"reference": reference, "label": labels(x)}
    targets.pop(missing)
    name = {"label": "task", "reference": "mse"}[missing]
    with pytest.raises(
        InputError, match=rf"^{name}: needs a {missing}, but {missing} is None; call loss\(x_hat, {missing}=...\)"
    ):
        full_sum()(x, **targets)


def test_a_terms_own_complaint_carries_the_name_it_has_in_the_sum() -> None:
    x, reference = image(), image()
    with pytest.raises(InputError, match=r"^pixels: x_hat \(2, 1, 6, 6\) and reference \(2, 6, 6\) differ in shape"):
        LossSum(pixels=mse())(x, reference=reference[:, 0])


class Broken(Term):
    reads = "reference"

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x_hat, reference):
        return x_hat.sum() * 0 + self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_is_named(value) -> None:
    loss = LossSum(mse=mse(), broken=Broken(value))
    with pytest.raises(
        FloatingPointError, match="^broken: the loss is (nan|inf) while x_hat is finite; look at this term"
    ):
        loss(image(), reference=image())


def test_an_x_hat_that_is_not_finite_is_blamed_itself() -> None:
    x = image()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="mse: .* x_hat is not finite; the denoiser diverged before it"):
        LossSum(mse=mse())(x, reference=image())


def test_parts_must_be_terms() -> None:
    with pytest.raises(TypeError, match=r"mse: expected a term or a LossSum, got MSELoss; wrap .* in Fidelity"):
        LossSum(mse=nn.MSELoss())
    with pytest.raises(TypeError, match="expected a term or a LossSum, got int"):
        mse() + 1


@pytest.mark.parametrize("weight", [float("nan"), "1", True, None])
def test_weights_must_be_finite_numbers(weight) -> None:
    with pytest.raises(InputError, match="fidelity: its weight must be a finite number or a callable of the step, got"):
        mse() * weight


def test_a_name_that_modules_need_is_refused() -> None:
    with pytest.raises(ValueError, match="a term cannot be called 'type': nn.Module uses that name; choose another"):
        LossSum(type=mse())


def test_a_term_must_return_a_scalar() -> None:
    class Rows(Term):
        def forward(self, x_hat):
            return x_hat.mean((1, 2, 3))

    with pytest.raises(
        InputError, match=r"rows: a term must return a scalar, got shape \(2,\); reduce it with .mean\(\)"
    ):
        LossSum(rows=Rows())(image())


def test_holds_no_parameters_and_no_state() -> None:
    loss = full_sum()
    assert list(loss.parameters()) == [] and loss.state_dict() == {}


def test_inputs_are_left_alone_by_the_whole_game() -> None:
    loss = full_sum()
    x, reference = image().requires_grad_(), image()
    y = labels(x)
    leaves_inputs_alone(lambda: loss(x, reference=reference, label=y), x, reference, y)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_survives_copying(clone) -> None:
    loss = full_sum()
    x, reference = image(), image()
    y = labels(x)
    twin = clone(loss)
    assert torch.equal(twin(x, reference=reference, label=y), loss(x, reference=reference, label=y))


def test_a_terms_name_is_made_once_with_its_class(monkeypatch) -> None:
    class PixelLoss(Fidelity):
        pass

    def fail(name):
        raise AssertionError("a regular expression in a forward pass cannot be compiled")

    term = PixelLoss(nn.MSELoss())
    monkeypatch.setattr("taskloss.algebra.snake_case", fail)
    assert term.where == "pixel_loss"
    assert LossSum(a=term)(torch.ones(1, 1, 4), reference=torch.zeros(1, 1, 4)) == 1
