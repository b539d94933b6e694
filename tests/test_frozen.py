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


class OwnLoss(nn.Module):
    """Computes its own loss, through a norm that has a child."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 1), norm

    def forward(self, x, label):
        if not self.training:
            raise RuntimeError("no loss in eval mode")
        return cross_entropy(self.norm(self.stem(x)), label)


class NormAndActivation(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class OwnStatistics(nn.Module):
    """A third party's norm: its own statistics, no torch class, and a child."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.act = nn.Sequential(nn.Dropout(0.5), nn.ReLU())

    def forward(self, x):
        return self.act(nn.functional.batch_norm(x, self.running_mean, self.running_var, training=self.training))


class DropPathAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return nn.functional.dropout(self.act(x), 0.5, self.training)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: NormAndActivation(3),
        lambda: OwnStatistics(3),
        lambda: nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3)),
        DropPathAct,
        lambda: pytest.importorskip("timm").layers.BatchNormAct2d(3),
    ],
    ids=["torch norm with a child", "norm of its own", "parametrised norm", "drop path", "timm"],
)
def test_layers_with_children_stay_in_eval_where_the_network_computes_its_loss(norm) -> None:
    loss = TaskOrientedLoss(OwnLoss(norm()), None)
    x = image()
    y = labels(x)
    before = loss.task_model.digest()
    first = loss(x, y)
    assert loss.task_model.digest() == before, "batch statistics moved"
    network = loss.task_model.network
    assert torch.equal(first, loss(x, y)) and torch.equal(first, cross_entropy(network.norm.eval()(network.stem(x)), y))
