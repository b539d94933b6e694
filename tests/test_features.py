"""Features of inner layers are what the layer gave, or an error, also for overwritten layers and many threads."""

import threading
from collections import namedtuple

import pytest
import torch
from torch import nn

from taskloss import Frozen, InputError, TaskConsistencyLoss
from tests.properties import image


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


Pair = namedtuple("Pair", "a b")


class Head(nn.Module):
    """A layer that gives a nest of tensors."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(1, 2, 1), wrap

    def forward(self, x):
        return self.wrap(self.conv(x))


class Overwrites(nn.Module):
    def __init__(self, wrap, pick) -> None:
        super().__init__()
        self.head, self.tail, self.pick = Head(wrap), nn.Conv2d(2, 2, 1), pick

    def forward(self, x):
        return self.tail(self.pick(self.head(x)).relu_())


NESTS = {
    "tensor": (lambda t: t, lambda o: o),
    "tuple": (lambda t: (t, 1), lambda o: o[0]),
    "dict": (lambda t: {"a": [t]}, lambda o: o["a"][0]),
    "named tuple": (lambda t: Pair(0, t), lambda o: o.b),
}


@pytest.mark.parametrize(("wrap", "pick"), NESTS.values(), ids=NESTS)
def test_an_overwritten_nest_is_refused_and_right_in_inference_mode(wrap, pick) -> None:
    frozen = Frozen(Overwrites(wrap, pick))
    x = image()
    with pytest.raises(InputError, match="layer 'head' is overwritten in place"):
        frozen.features(x, ["head", "tail"])
    with torch.inference_mode():
        features = frozen.features(x, ["head", "tail"])
        right = frozen.network.head.conv(x)
    assert (right < 0).any()
    torch.testing.assert_close(pick(features["head"]), right)


def test_threads_on_one_loss_get_their_own_features() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh())
    loss = TaskConsistencyLoss(net, nn.MSELoss(), layers=["1", "3"])
    pairs = [(image(size=24) * (k + 1), image(size=24)) for k in range(3)]
    expected = [loss(*pair).item() for pair in pairs]
    wrong: list[object] = []

    def work(k: int) -> None:
        for _ in range(30):
            try:
                if abs(loss(*pairs[k]).item() - expected[k]) > 1e-6:
                    wrong.append(k)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(m._forward_hooks for m in loss.task_model.network.modules())
