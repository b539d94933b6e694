"""Fidelity is its criterion, with nothing broadcast, trained or silently out of range."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import Fidelity, InputError
from tests.properties import image, leaves_inputs_alone


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.L1Loss(), F.huber_loss], ids=["mse", "l1", "function"])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_is_its_criterion(spatial_dims, criterion) -> None:
    x, reference = image(spatial_dims), image(spatial_dims)
    assert torch.equal(Fidelity(criterion)(x, reference), criterion(x, reference))


def test_gradcheck_in_float64() -> None:
    x, reference = image(dtype=torch.float64), image(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: Fidelity(nn.MSELoss())(t, reference), x.requires_grad_())


def test_one_value_per_sample_is_averaged() -> None:
    def per_sample(x, y):
        return (x - y).square().mean((1, 2, 3)).reshape(-1, 1, 1, 1)

    x, reference = image(), image()
    torch.testing.assert_close(Fidelity(per_sample)(x, reference), F.mse_loss(x, reference))


def test_preprocess_acts_on_both_images() -> None:
    x, reference = image(), image()
    torch.testing.assert_close(
        Fidelity(nn.MSELoss(), preprocess=lambda t: 2 * t)(x, reference), 4 * F.mse_loss(x, reference)
    )


def test_a_criterion_with_weights_is_neither_trained_nor_saved() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.drop = nn.Conv2d(1, 4, 1), nn.Dropout(0.5)

        def forward(self, x, y):
            return (self.drop(self.lin(x)) - self.drop(self.lin(y))).square().mean()

    fidelity = Fidelity(Learned()).train()
    x, reference = image().requires_grad_(), image()
    assert list(fidelity.parameters()) == [] and fidelity.state_dict() == {}
    assert torch.equal(fidelity(x, reference), fidelity(x, reference)), "dropout is on"


def test_inputs_are_left_alone() -> None:
    x, reference = image(), image()
    leaves_inputs_alone(lambda: Fidelity(nn.MSELoss())(x, reference), x, reference)


SENTENCES = {
    "no channel": (
        lambda x: x[:, 0],
        r"x_hat \(2, 1, 6, 6\) and reference \(2, 6, 6\) differ in shape; add .* axis with reference\[:, None\]",
    ),
    "one sample": (
        lambda x: x[:1],
        r"x_hat \(2, 1, 6, 6\) and reference \(1, 1, 6, 6\) differ .* nothing is broadcast",
    ),
    "bytes": (lambda x: x.byte(), r"reference must be floating point, got torch.uint8; call reference.float\(\)"),
    "elsewhere": (lambda x: x.to("meta"), r"x_hat is on cpu but reference is on meta; call reference.to\('cpu'\)"),
    "no tensor": (lambda x: 1.0, "reference must be a tensor like x_hat, got float"),
}


@pytest.mark.parametrize(("wrong", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_bad_references_get_one_sentence(wrong, sentence) -> None:
    x = image()
    with pytest.raises(InputError, match="^fidelity: " + sentence):
        Fidelity(nn.MSELoss())(x, wrong(x))


def test_a_criterion_that_does_not_reduce_is_refused() -> None:
    with pytest.raises(InputError, match=r"fidelity: the criterion must return a scalar .* reduce it with .mean\(\)"):
        Fidelity(nn.MSELoss(reduction="none"))(image(), image())


def test_a_criterion_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"criterion must be callable as criterion\(x_hat, reference\), got float"):
        Fidelity(0.5)  # type: ignore[arg-type]
