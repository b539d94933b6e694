"""A frozen network stays what it was, whatever its parents go through."""

import copy
import pickle

import pytest
import torch
from torch import nn

from taskloss import Frozen, InputError, TaskOrientedLoss
from tests.properties import cross_entropy, image, labels, segmenter


class Parent(nn.Module):
    """Somebody's training module: a denoiser and a loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.denoiser = nn.Conv2d(1, 1, 3, padding=1)
        self.loss = TaskOrientedLoss(network, cross_entropy)


def test_hidden_from_parameters_buffers_and_state_dict() -> None:
    parent = Parent(segmenter())
    assert list(parent.loss.parameters()) == []
    assert list(parent.loss.buffers()) == []
    assert parent.loss.state_dict() == {}
    assert {n.split(".")[0] for n, _ in parent.named_parameters()} == {"denoiser"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in parent.modules())


def wreck(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.constant_(parameter, 7.0)


@pytest.mark.parametrize(
    "act",
    [
        lambda p: p.train(),
        lambda p: p.apply(wreck),
        lambda p: p.requires_grad_(True),
        lambda p: p.load_state_dict(p.state_dict(), strict=True),
        lambda p: p.zero_grad(),
    ],
    ids=["train", "apply", "requires_grad_", "load_state_dict", "zero_grad"],
)
def test_untouched_by_its_parent(act) -> None:
    parent = Parent(segmenter())
    before = parent.loss.task_model.digest()
    act(parent)
    network = parent.loss.task_model.network
    assert parent.loss.task_model.digest() == before
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_bit_equal_after_real_optimiser_steps() -> None:
    parent = Parent(segmenter())
    before = parent.loss.task_model.digest()
    parent.train()
    optimizer = torch.optim.Adam(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        x = image()
        optimizer.zero_grad()
        parent.loss(parent.denoiser(x), labels(x)).backward()
        optimizer.step()
    assert parent.loss.task_model.digest() == before
    assert all(p.grad is None for p in parent.loss.task_model.network.parameters())


def test_moves_and_casts_with_its_parent() -> None:
    parent = Parent(segmenter()).to(torch.float64)
    network = parent.loss.task_model.network
    assert {t.dtype for t in (*network.parameters(), network[1].running_mean)} == {torch.float64}
    parent.to("meta")
    assert next(network.parameters()).device.type == "meta"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_moves_to_cuda() -> None:
    parent = Parent(segmenter()).cuda()
    x = image().cuda().requires_grad_()
    parent.loss(x, labels(x).cuda()).backward()
    assert x.grad is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_survives_copying(clone) -> None:
    parent = Parent(segmenter())
    twin = clone(parent)
    assert twin.loss.task_model.digest() == parent.loss.task_model.digest()
    x = image()
    y = labels(x)
    assert torch.equal(twin.loss(x, y), parent.loss(x, y))
    assert twin.loss.task_model.network is not parent.loss.task_model.network
    assert twin.loss.state_dict() == {}


def test_strict_load_of_a_checkpoint_from_before_the_loss_was_added() -> None:
    parent = Parent(segmenter())
    saved = {f"denoiser.{k}": v for k, v in nn.Conv2d(1, 1, 3).state_dict().items()}
    parent.load_state_dict(saved, strict=True)


def test_the_callers_network_is_left_as_it_was() -> None:
    network = segmenter().train()
    state = {k: v.clone() for k, v in network.state_dict().items()}
    loss = TaskOrientedLoss(network, cross_entropy)
    x = image().requires_grad_()
    loss(x, labels(x)).backward()
    assert network.training and network[3].training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        network[0].weight.zero_()
    assert loss.task_model.network[0].weight.any(), "the copy follows the original"


def test_digest_sees_every_bit_of_parameters_and_buffers() -> None:
    network = segmenter()
    digests = {Frozen(network).digest()}
    with torch.no_grad():
        network[4].bias[0] = torch.nextafter(network[4].bias[0], torch.tensor(9.0))
        digests.add(Frozen(network).digest())
        network[1].running_var[2] *= 2
    digests.add(Frozen(network).digest())
    assert len(digests) == 3
    half = Frozen(network.to(torch.bfloat16))
    assert half.digest() == Frozen(network).digest() and len(half.digest()) == 64


def test_sharing_one_network_in_place() -> None:
    network = segmenter()
    frozen = Frozen(network, copy=False)
    assert frozen.network is network and not network.training
    network.train()
    with pytest.raises(
        InputError, match=r"frozen: the shared network's 'root' was switched to training mode; call net"
    ):
        frozen(image())
    network.eval().requires_grad_(True)
    with pytest.raises(
        InputError, match=r"the shared network's '0.weight' requires a gradient again; call network.req"
    ):
        frozen(image())


def test_one_frozen_network_serves_several_terms() -> None:
    frozen = Frozen(segmenter())
    first, second = (TaskOrientedLoss(frozen, cross_entropy) for _ in range(2))
    assert first.task_model is second.task_model is frozen


def test_wrappers_of_data_parallel_training_are_taken_off() -> None:
    network = segmenter()
    assert isinstance(Frozen(nn.DataParallel(network)).network, nn.Sequential)
    assert Frozen(Frozen(network)).digest() == Frozen(network).digest()


def test_a_function_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"frozen: expected an nn.Module, got function; wrap the function in an nn.Mod"):
        Frozen(lambda x: x)


def test_features_stop_after_the_last_layer_they_need() -> None:
    ran = []
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), nn.Conv2d(2, 2, 1))
    network[2].register_forward_hook(lambda *_: ran.append(1))
    frozen = Frozen(network, copy=False)
    x = image()
    features = frozen.features(x, ["1", "0"])
    assert list(features) == ["1", "0"] and not ran
    assert torch.equal(features["1"], network[1](network[0](x)))
    assert not network[0]._forward_hooks, "hooks stay behind"


def test_features_overwritten_in_place_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1))
    with pytest.raises(InputError, match=r"layer '0' is overwritten in place by the layer after it; name that layer"):
        Frozen(network).features(image(), ["0", "2"])


def test_features_of_a_layer_that_never_runs() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.used(x)

    with pytest.raises(InputError, match="layer 'unused' never ran in the network's forward pass"):
        Frozen(Lazy()).features(image(), ["unused"])
