"""TaskConsistencyLoss compares what T sees in two images, at its output or at named layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import InputError, TaskConsistencyLoss, soft_kl
from tests.properties import image, leaves_inputs_alone, segmenter


def pair(spatial_dims: int = 2, **kwargs):
    return image(spatial_dims, **kwargs), image(spatial_dims, **kwargs)


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_at_the_output_it_is_the_distance_by_hand(spatial_dims) -> None:
    net = segmenter(spatial_dims).eval()
    x, reference = pair(spatial_dims)
    expected = F.mse_loss(net(x).softmax(1), net(reference).softmax(1))
    loss = TaskConsistencyLoss(net, nn.MSELoss(), output=lambda logits: logits.softmax(1))
    torch.testing.assert_close(loss(x, reference), expected)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["stored", "checkpointed"])
def test_at_layers_it_is_the_perceptual_loss_of_eq_7(checkpoint) -> None:
    net = segmenter().eval()
    x, reference = pair()
    x.requires_grad_()
    loss = TaskConsistencyLoss(net, nn.MSELoss(), layers={"2": 0.5, "0": 2.0}, checkpoint=checkpoint)
    expected = 0.5 * F.mse_loss(net[:3](x), net[:3](reference)) + 2 * F.mse_loss(net[:1](x), net[:1](reference))
    torch.testing.assert_close(loss(x, reference), expected)
    (by_hand,) = torch.autograd.grad(expected, x)
    (gradient,) = torch.autograd.grad(loss(x, reference), x)
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("layers", [None, ["2"]], ids=["output", "layer"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gradcheck_in_float64(spatial_dims, layers) -> None:
    loss = TaskConsistencyLoss(segmenter(spatial_dims), nn.MSELoss(), layers=layers).double()
    x, reference = pair(spatial_dims, size=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: loss(t, reference), x.requires_grad_())


def test_zero_if_and_only_if_equal() -> None:
    loss = TaskConsistencyLoss(segmenter(), nn.MSELoss(), layers=["2"])
    x, reference = pair()
    assert loss(x, x.clone()) == 0
    assert loss(x, reference) > 0


def test_the_reference_branch_builds_no_graph() -> None:
    net = segmenter()
    x, reference = pair()
    reference.requires_grad_()
    saved = []
    loss = TaskConsistencyLoss(net, lambda p, t: saved.append(t.requires_grad) or F.mse_loss(p, t))
    loss(x.requires_grad_(), reference).backward()
    assert saved == [False] and reference.grad is None and x.grad.any()


def test_inputs_are_left_alone() -> None:
    loss = TaskConsistencyLoss(segmenter(), nn.MSELoss(), layers=["0"])
    x, reference = pair()
    leaves_inputs_alone(lambda: loss(x, reference), x, reference)


def test_soft_kl_is_torchs_and_zero_at_equal_logits() -> None:
    p, q = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    expected = F.kl_div((p / 2).log_softmax(1), (q / 2).softmax(1), reduction="sum") * 4 / (3 * 4)
    torch.testing.assert_close(soft_kl(p, q, temperature=2.0), expected)
    assert soft_kl(q, q) == 0
    net = segmenter()
    x, reference = pair()
    torch.testing.assert_close(TaskConsistencyLoss(net, soft_kl)(x, reference), soft_kl(net.eval()(x), net(reference)))


class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return 3 * x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        return self.scale * x


class TestCache:
    def setup_method(self) -> None:
        Counting.calls = 0
        self.loss = TaskConsistencyLoss(Counting(), nn.MSELoss(), cache=True)
        self.x, self.reference = pair()

    def test_a_hit_gives_the_identical_loss_with_one_forward_less(self) -> None:
        first = self.loss(self.x, self.reference)
        assert Counting.calls == 2
        assert torch.equal(first, self.loss(self.x, self.reference))
        assert Counting.calls == 3

    def test_a_reference_written_to_is_looked_at_again(self) -> None:
        self.loss(self.x, self.reference)
        self.reference.add_(1)
        torch.testing.assert_close(self.loss(self.x, self.reference), F.mse_loss(3 * self.x, 3 * self.reference))

    def test_another_tensor_of_equal_shape_is_no_hit(self) -> None:
        self.loss(self.x, self.reference)
        other = self.reference.clone() + 1
        torch.testing.assert_close(self.loss(self.x, other), F.mse_loss(3 * self.x, 3 * other))

    @pytest.mark.parametrize(
        "write",
        [
            lambda array, tensor: array.__iadd__(1),
            lambda array, tensor: tensor.data.add_(1),
            lambda array, tensor: tensor.detach().numpy().fill(0.3),
        ],
        ids=["shared memory", "data", "a view in numpy"],
    )
    def test_a_write_that_no_version_counts_is_seen(self, write) -> None:
        array = self.reference.numpy().copy()
        reference = torch.from_numpy(array)
        self.loss(self.x, reference)
        write(array, reference)
        torch.testing.assert_close(self.loss(self.x, reference), F.mse_loss(3 * self.x, 3 * reference))

    def test_an_equal_tensor_is_a_hit(self) -> None:
        first = self.loss(self.x, self.reference)
        assert torch.equal(self.loss(self.x, self.reference.clone()), first)
        assert Counting.calls == 3

    @pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
    @pytest.mark.parametrize(
        "update",
        [
            lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
            lambda net: torch.nn.init.constant_(net[0].weight, 0.5),
            lambda net: net[0].weight.data.mul_(2),
            lambda net: net[0].weight.data.copy_(net[0].weight.data.flip(0)),
            lambda net: net[0].weight.detach().numpy().fill(0.1),
        ],
        ids=["load_state_dict", "init", "data", "permuted", "numpy"],
    )
    def test_an_updated_network_is_asked_again(self, update, shared) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh())
        loss = TaskConsistencyLoss(net, nn.MSELoss(), copy=not shared, cache=True)
        before = loss(self.x, self.reference)
        assert torch.equal(loss(self.x, self.reference), before)
        with torch.no_grad():
            update(net)
        expected = F.mse_loss(net(self.x), net(self.reference)) if shared else before
        torch.testing.assert_close(loss(self.x, self.reference), expected)

    def test_a_shared_network_with_plain_tensors_is_asked_again(self) -> None:
        net = Scaled()
        loss = TaskConsistencyLoss(net, nn.MSELoss(), copy=False, cache=True)
        for scale in (net.scale.mul_(3), torch.tensor(5.0)):
            net.scale = scale
            torch.testing.assert_close(loss(self.x, self.reference), F.mse_loss(net(self.x), net(self.reference)))

    def test_another_precision_is_asked_again(self) -> None:
        loss = TaskConsistencyLoss(segmenter(), nn.MSELoss(), cache=True)
        x, reference = pair()
        loss(x, reference)
        loss.double()
        assert loss(x.double(), reference.double()).dtype == torch.float64

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
    def test_copies_start_empty(self, clone) -> None:
        self.loss(self.x, self.reference)
        assert torch.equal(clone(self.loss)(self.x, self.reference), self.loss(self.x, self.reference))


def test_an_unknown_layer_is_refused_with_the_nearest_names() -> None:
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh())})
    with pytest.raises(
        InputError, match=r"the network has no layer 'encodr.1'; did you mean 'encoder.1' or .*named_mod"
    ):
        TaskConsistencyLoss(net, nn.MSELoss(), layers=["encodr.1"])


def test_no_layers_is_not_all_layers() -> None:
    with pytest.raises(ValueError, match="layers is empty; name at least one, or pass None for the output"):
        TaskConsistencyLoss(segmenter(), nn.MSELoss(), layers=[])


def test_a_blocked_gradient_is_an_error_that_names_the_module() -> None:
    class Detach(nn.Module):
        def forward(self, x):
            return x.detach()

    x, reference = pair()
    loss = TaskConsistencyLoss(nn.Sequential(nn.Conv2d(1, 1, 1), Detach()), nn.MSELoss())
    with pytest.raises(InputError, match=r"consistency_loss: the gradient does not reach x_hat; '1' blocks it"):
        loss(x.requires_grad_(), reference)


def test_a_reference_of_another_shape_is_refused() -> None:
    x, reference = pair()
    loss = TaskConsistencyLoss(segmenter(), nn.MSELoss())
    with pytest.raises(
        InputError, match=r"x_hat \(2, 1, 6, 6\) and reference \(1, 1, 6, 6\) differ in shape; make them"
    ):
        loss(x, reference[:1])


def test_a_wrong_range_is_refused_by_the_first_reference() -> None:
    x, reference = pair()
    loss = TaskConsistencyLoss(segmenter(), nn.MSELoss(), expects=(0, 1))
    with pytest.raises(InputError, match=r"spans \[.*\] but \[0, 1\] is expected"):
        loss(x, reference * 255)
