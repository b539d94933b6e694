"""TaskOrientedLoss is criterion(T(x_hat), label), and so is its gradient."""

import pytest
import torch
from torch import nn

from taskloss import InputError, TaskOrientedLoss
from tests.properties import by_hand, cross_entropy, image, labels, leaves_inputs_alone, segmenter, soft_dice


@pytest.mark.parametrize("criterion", [cross_entropy, soft_dice, nn.CrossEntropyLoss()], ids=["ce", "dice", "module"])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_equals_the_criterion_by_hand(spatial_dims, criterion) -> None:
    net = segmenter(spatial_dims)
    x = image(spatial_dims)
    y = labels(x)
    value, gradient = by_hand(net, criterion, x, y)
    x.requires_grad_()
    loss = TaskOrientedLoss(net, criterion)(x, y)
    loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradcheck_in_float64(spatial_dims, checkpoint) -> None:
    loss = TaskOrientedLoss(segmenter(spatial_dims), soft_dice, checkpoint=checkpoint).double()
    x = image(spatial_dims, size=4, dtype=torch.float64)
    y = labels(x)
    assert torch.autograd.gradcheck(lambda t: loss(t, y), x.requires_grad_())


def test_an_identity_task_is_its_criterion() -> None:
    x, y = image(), image()
    assert TaskOrientedLoss(nn.Identity(), nn.MSELoss())(x, y) == nn.functional.mse_loss(x, y)


def test_the_order_of_the_batch_does_not_matter() -> None:
    loss = TaskOrientedLoss(segmenter(), soft_dice)
    x = image(n=4)
    y = labels(x)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(x, y), loss(x[order], y[order]))


def test_inputs_and_random_state_are_left_alone() -> None:
    loss = TaskOrientedLoss(segmenter(), soft_dice)
    x = image().requires_grad_()
    y = labels(x)
    leaves_inputs_alone(lambda: loss(x, y), x, y)


def test_preprocess_and_output_are_differentiated_through() -> None:
    net = segmenter(channels=3)

    class Dict(nn.Module):
        def forward(self, x):
            return {"out": (net(x), None)}

    x = image()
    y = labels(x)
    value, gradient = by_hand(net, lambda p, t: cross_entropy(p, t), x.expand(-1, 3, -1, -1) * 2 - 1, y)
    loss = TaskOrientedLoss(
        Dict().eval(),
        cross_entropy,
        preprocess=lambda t: t.expand(-1, 3, -1, -1) * 2 - 1,
        output=lambda d: d["out"][0],
    )
    net.eval()
    x.requires_grad_()
    result = loss(x, y)
    result.backward()
    torch.testing.assert_close(result.detach(), value)
    torch.testing.assert_close(x.grad, 2 * gradient.sum(1, keepdim=True))


def test_a_module_as_preprocess_or_criterion_moves_with_the_loss_and_is_hidden() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.8]))
    loss = TaskOrientedLoss(segmenter(), weighted, preprocess=nn.Conv2d(1, 1, 1)).double()
    x = image(dtype=torch.float64)
    assert loss(x, labels(x)).dtype == torch.float64
    assert list(loss.parameters()) == [] and loss.state_dict() == {}
    assert weighted.weight.dtype == torch.float32


class TestMissingLabels:
    def setup_method(self) -> None:
        self.net = segmenter()
        self.loss = TaskOrientedLoss(self.net, cross_entropy)
        self.x = image(n=3).requires_grad_()
        self.y = labels(self.x)

    def test_none_in_a_list_leaves_the_sample_out(self) -> None:
        value = self.loss(self.x, [self.y[0], None, self.y[2]])
        kept = torch.tensor([0, 2])
        torch.testing.assert_close(value, self.loss(self.x[kept], self.y[kept]))
        value.backward()
        assert not self.x.grad[1].any() and self.x.grad[0].any()

    def test_a_filling_value_leaves_the_sample_out(self) -> None:
        self.y[1] = -1
        loss = TaskOrientedLoss(self.net, cross_entropy, missing=-1)
        kept = torch.tensor([0, 2])
        torch.testing.assert_close(loss(self.x, self.y), loss(self.x[kept], self.y[kept]))

    def test_nan_can_be_the_filling_value(self) -> None:
        loss = TaskOrientedLoss(nn.Identity(), nn.MSELoss(), missing=float("nan"))
        target = torch.zeros_like(self.x)
        target[0] = float("nan")
        torch.testing.assert_close(loss(self.x, target), self.x[1:].square().mean())

    @pytest.mark.parametrize("filled", [False, True], ids=["list of None", "filled"])
    def test_no_label_at_all_is_a_zero_that_back_propagates(self, filled) -> None:
        loss = TaskOrientedLoss(self.net, cross_entropy, missing=-1)
        value = loss(self.x * 2, torch.full_like(self.y, -1) if filled else [None] * 3)
        assert value == 0
        value.backward()
        assert torch.equal(self.x.grad, torch.zeros_like(self.x))

    def test_an_organ_absent_from_the_label_still_has_a_gradient(self) -> None:
        TaskOrientedLoss(self.net, soft_dice)(self.x, torch.zeros_like(self.y)).backward()
        assert self.x.grad.any()


class TestSeveralNetworks:
    def setup_method(self) -> None:
        self.nets = [segmenter() for _ in range(3)]
        self.x = image()
        self.y = labels(self.x)
        self.each = [by_hand(net, cross_entropy, self.x, self.y)[0] for net in self.nets]

    def test_mean(self) -> None:
        torch.testing.assert_close(
            TaskOrientedLoss(self.nets, cross_entropy)(self.x, self.y), torch.stack(self.each).mean()
        )

    def test_one_per_call_in_turns_that_a_resumed_run_goes_on_with(self) -> None:
        loss = TaskOrientedLoss(self.nets, cross_entropy, ensemble="turns")
        for expected in self.each + self.each[:1]:
            torch.testing.assert_close(loss(self.x, self.y), expected)
        resumed = TaskOrientedLoss(self.nets, cross_entropy, ensemble="turns")
        resumed.load_state_dict(loss.state_dict())
        torch.testing.assert_close(resumed(self.x, self.y), self.each[1])

    def test_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="task_model is empty; give at least one network"):
            TaskOrientedLoss([], cross_entropy)


class Blocked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 2, 1)
        self.head = nn.Module()
        self.head.argmax = ArgMax()

    def forward(self, x):
        return self.head.argmax(self.body(x))


class ArgMax(nn.Module):
    def forward(self, x):
        return x.argmax(1, keepdim=True).float()


def test_a_blocked_gradient_is_an_error_that_names_the_module() -> None:
    loss = TaskOrientedLoss(Blocked(), nn.MSELoss())
    x = image()
    target = torch.zeros(2, 1, 6, 6)
    assert loss(x, target) >= 0, "without a gradient to lose, it is just a number"
    with pytest.raises(
        InputError, match=r"the gradient does not reach x_hat; 'head.argmax' blocks it \(see audit_task_model\)"
    ):
        loss(x.requires_grad_(), target)


def test_a_preprocess_that_blocks_is_named() -> None:
    loss = TaskOrientedLoss(segmenter(), cross_entropy, preprocess=lambda t: t.detach())
    x = image().requires_grad_()
    with pytest.raises(InputError, match="the gradient does not reach x_hat; preprocess blocks it"):
        loss(x, labels(x))


SENTENCES = {
    "no label": (
        lambda loss, x, y: loss(x, None),
        r"needs a label, but label is None; call loss\(x_hat, label=...\)",
    ),
    "short label": (
        lambda loss, x, y: loss(x, y[:1]),
        r"x_hat holds 2 samples but label has shape \(1, 6, 6\); its first axis must be the batch",
    ),
    "short list": (lambda loss, x, y: loss(x, [y[0]]), "x_hat holds 2 samples but label has 1 entries"),
    "no batch axis": (
        lambda loss, x, y: loss(x[0, 0], y),
        r"x_hat must be \(N, C, \*spatial\) with 1 to 3 spatial axes, got \(6, 6\); add .* x_hat\[None, None\]",
    ),
    "integers": (
        lambda loss, x, y: loss((x * 255).byte(), y),
        r"x_hat must be floating point, got torch.uint8; call x_hat.float\(\)",
    ),
    "no tensor": (lambda loss, x, y: loss([1], y), "x_hat must be a tensor .*, got list"),
    "double": (
        lambda loss, x, y: loss(x.double(), y),
        r"x_hat is torch.float64 but the task network is torch.float32; call loss.to\(torch.float64\)",
    ),
    "label elsewhere": (
        lambda loss, x, y: loss(x, y.to("meta")),
        r"x_hat is on cpu but label is on meta; call label.to\('cpu'\)",
    ),
    "network elsewhere": (
        lambda loss, x, y: loss.to("meta")(x, y),
        r"x_hat is on cpu but the task network is on meta; call loss.to\('cpu'\)",
    ),
}


@pytest.mark.parametrize(("act", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_bad_input_gets_one_sentence(act, sentence) -> None:
    x = image()
    with pytest.raises(InputError, match="^task_oriented_loss: " + sentence):
        act(TaskOrientedLoss(segmenter(), cross_entropy), x, labels(x))


def test_a_criterion_that_does_not_reduce_is_refused() -> None:
    x = image()
    loss = TaskOrientedLoss(segmenter(), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(
        InputError, match=r"a scalar or one value per sample, got shape \(2, 6, 6\); reduce it with .mean"
    ):
        loss(x, labels(x))


@pytest.mark.parametrize(
    ("kwargs", "kind", "sentence"),
    [
        ({"ensemble": "median"}, ValueError, "ensemble must be 'mean' or 'turns', got 'median'"),
        (
            {"task_criterion": 3},
            TypeError,
            r"task_criterion must be callable as criterion\(prediction, label\), got int",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(kwargs, kind, sentence) -> None:
    with pytest.raises(kind, match=sentence):
        TaskOrientedLoss(**{"task_model": segmenter(), "task_criterion": cross_entropy, **kwargs})


@pytest.mark.parametrize(
    ("expects", "scale", "shift"), [((0, 1), 255, 0), ((0, 255), 1, 0), ((-1, 1), 1, 0), ((0, 1), 2000, -1000)]
)
def test_a_wrong_range_is_refused_at_the_first_call(expects, scale, shift) -> None:
    x = image(size=16) * scale + shift
    loss = TaskOrientedLoss(segmenter(), cross_entropy, expects=expects)
    with pytest.raises(InputError, match=r"the input spans \[.*\] but \[.*\] is expected; convert it with preprocess"):
        loss(x, labels(x))


@pytest.mark.parametrize("expects", [(0, 1), (-1, 1)])
def test_a_right_range_is_accepted_with_some_overshoot(expects) -> None:
    low, high = expects
    x = low + (high - low) * (1.4 * image(size=16) - 0.2)
    TaskOrientedLoss(segmenter(), cross_entropy, expects=expects)(x, labels(x))


def test_a_wrong_range_is_refused_in_a_list_of_images_too() -> None:
    class First(nn.Module):
        def forward(self, images):
            return torch.stack(list(images))

    x = image(size=16) * 255
    loss = TaskOrientedLoss(First(), nn.MSELoss(), preprocess=list, expects=(0, 1))
    with pytest.raises(InputError, match=r"the input spans \[.*\] but \[0, 1\] is expected"):
        loss(x, x)
