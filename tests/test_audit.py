"""The audit names every way in which a network would be a bad guide, and finds nothing wrong with a good one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskloss import InputError, TaskOrientedLoss, audit_task_model
from tests.properties import image, segmenter


class Wrap(nn.Module):
    """A named inner module between two convolutions."""

    def __init__(self, inner: nn.Module, after: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.inner = inner
        self.head = nn.Conv2d(3, 2, 1) if after else nn.Identity()

    def forward(self, x):
        return self.head(self.inner(self.stem(x)))


def make(function, **kwargs) -> nn.Module:
    class Inner(nn.Module):
        def forward(self, x):
            return function(x)

    return Wrap(Inner(), **kwargs)


def always_train_norm() -> nn.Module:
    class AlwaysTrain(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    return Wrap(AlwaysTrain(3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.head(self.scale(x))


CASES = {
    "functional dropout": (lambda: make(lambda x: F.dropout(x, 0.5)), {"random": "inner"}),
    "untracked batch norm": (
        lambda: Wrap(nn.BatchNorm2d(3, track_running_stats=False)),
        {"batch_statistics": "inner"},
    ),
    "batch norm that always trains": (always_train_norm, {"batch_statistics": "inner", "moving_state": "inner"}),
    "detach": (lambda: make(lambda x: x.detach()), {"blocked_gradient": "inner"}),
    "argmax": (lambda: make(lambda x: x.argmax(1).float(), after=False), {"blocked_gradient": "inner"}),
    "no_grad": (lambda: make(torch.no_grad()(lambda x: x * 2)), {"blocked_gradient": "inner"}),
    "rounding": (lambda: make(torch.round, after=False), {"zero_gradient": "Wrap"}),
    "in-place input": (InPlace, {"in_place": "scale"}),
    "tuple output": (lambda: make(lambda x: (x, x), after=False), {"output_type": "Wrap"}),
}


@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)
def test_finds(build, expected) -> None:
    findings = audit_task_model(build().eval(), image(channels=1, n=1))
    assert {f.kind: f.module for f in findings} == expected
    assert all(str(f).startswith(f.module + ": ") for f in findings)


def nan_net() -> nn.Module:
    net = make(lambda x: (x - x.mean((2, 3), keepdim=True)).square().sum((2, 3), keepdim=True).sqrt() + x)
    net.stem = nn.Conv2d(1, 3, 1)  # without padding a constant stays constant
    return net


def test_finds_the_module_whose_gradient_is_nan_on_a_constant_image() -> None:
    (finding,) = audit_task_model(nan_net(), image())
    assert (finding.kind, finding.module) == ("nan_gradient", "inner")
    assert "add a small epsilon" in finding.message


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_a_clean_network_gives_none(spatial_dims) -> None:
    assert audit_task_model(segmenter(spatial_dims).train(), image(spatial_dims, n=1)) == ()


def test_a_clean_u_net_gives_none() -> None:
    monai = pytest.importorskip("monai.networks.nets")
    net = monai.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), norm="BATCH", dropout=0.1
    )
    assert audit_task_model(net, torch.rand(1, 1, 8, 8, 8)) == ()


def test_output_picks_the_tensor_first() -> None:
    net = make(lambda x: (x, x), after=False)
    assert audit_task_model(net, image(), output=lambda pair: pair[0]) == ()


def test_finds_an_input_in_the_wrong_range() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    for _ in range(50):
        net(image(n=8))
    net.eval()
    assert audit_task_model(net, image()) == ()
    (finding,) = audit_task_model(net, 255 * image())
    assert (finding.kind, finding.module) == ("input_range", "1")
    assert "is the example in the range that T was trained on?" in finding.message


def test_leaves_network_example_and_random_state_alone() -> None:
    net = segmenter().train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x = image()
    before, rng = x.clone(), torch.get_rng_state()
    audit_task_model(net, x)
    assert torch.equal(x, before) and x.grad is None and not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# --- networks of every shape: nothing wrong is found where nothing is wrong ------------------------------------------


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, h):
        return h + self.linear(h)


class Built(nn.Module):
    """A stem of four channels, a part called ``inner``, and whatever is made of them."""

    def __init__(self, function, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.inner = KeywordOnly() if inner is None else inner
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Mask(nn.Module):
    def forward(self, x):
        return x > 0.5


class Complex(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x, dim=-1)


def rows(net, x):  # (N, positions, channels)
    return net.stem(x).flatten(2).transpose(1, 2)


class InvertedTransformer(nn.Module):
    """Attention with the batch on its second axis, torch's default."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def boxes(net, x):
    """A list of dicts, one per image, with as many boxes as the image is bright."""
    found = []
    for one in x:
        scores = net.stem(one[None]).flatten(1)[0]
        keep = scores > scores.mean()
        found.append({"scores": scores[keep], "keep": keep})
    return found


CLEAN = {
    "batch axis second inside": lambda: Built(lambda n, x: n.inner(h=rows(n, x).transpose(0, 1)).mean(0)),
    "batch axis second at the end": lambda: Built(lambda n, x: rows(n, x).transpose(0, 1)),
    "batch axis last": lambda: Built(lambda n, x: rows(n, x).permute(1, 2, 0)),
    "attention, batch second": lambda: Built(
        lambda n, x: n.inner(rows(n, x).transpose(0, 1)).transpose(0, 1), InvertedTransformer()
    ),
    "recurrent": lambda: Built(lambda n, x: n.inner(rows(n, x).transpose(0, 1))[0], nn.LSTM(4, 3)),
    "samples merged with positions": lambda: Built(lambda n, x: n.inner(h=rows(n, x).flatten(0, 1))),
    "qkv first": lambda: Built(lambda n, x: rows(n, x).unflatten(2, (2, 2)).permute(2, 0, 1, 3)),
    "boolean masks": lambda: Built(lambda n, x: n.stem(x) * n.inner(x), Mask()),
    "complex": lambda: Built(lambda n, x: torch.fft.irfft(n.inner(n.stem(x))), Complex()),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("build", CLEAN.values(), ids=CLEAN)
def test_a_clean_network_of_any_layout_gives_none(build, n) -> None:
    assert audit_task_model(build(), image(n=n)) == ()


@pytest.mark.parametrize(
    ("build", "output"),
    [
        (lambda: Built(lambda n, x: [n.stem(one[None]) for one in x]), torch.cat),
        (lambda: Built(boxes), lambda found: found[0]["scores"]),
        (lambda: Built(lambda n, x: {"a": (n.stem(x), x > 0.5)}), lambda found: found["a"][0]),
    ],
    ids=["a list of images", "boxes", "nest"],
)
def test_a_nest_with_something_for_each_image_is_clean_through_output(build, output) -> None:
    assert audit_task_model(build(), image(), output=output) == ()


def test_inputs_need_no_channels() -> None:
    assert audit_task_model(nn.Linear(8, 3), torch.rand(2, 8)) == ()
    assert audit_task_model(nn.GRU(8, 3, batch_first=True), torch.rand(2, 5, 8), output=lambda found: found[0]) == ()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x, meta):
        return self.conv(x) * meta[:, None, None, None]


def test_a_network_with_two_inputs_says_what_it_lacks_and_takes_them() -> None:
    (finding,) = audit_task_model(TwoInputs(), image())
    assert (finding.kind, finding.module) == ("inputs", "TwoInputs")
    assert "missing a required argument: 'meta'" in finding.message and "(image, ...)" in finding.message
    assert audit_task_model(TwoInputs(), (image(), torch.ones(2))) == ()
    assert audit_task_model(TwoInputs(), {"meta": torch.ones(2, dtype=torch.long), "x": image()}) == ()


def test_an_example_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"audit_task_model: the network does not run on the example \(RuntimeError: "):
        audit_task_model(segmenter(), image(channels=2))
    with pytest.raises(InputError, match="example must hold a floating-point batch"):
        audit_task_model(segmenter(), torch.ones(1, 1, 4, 4, dtype=torch.long))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_as_a_whole_or_a_part() -> None:
    scripted = torch.jit.script(segmenter().eval())
    assert audit_task_model(scripted, image()) == ()
    assert audit_task_model(nn.Sequential(nn.Conv2d(1, 1, 1), scripted), image()) == ()
    blocked = torch.jit.script(Blocked())
    assert [(f.kind, f.module) for f in audit_task_model(blocked, image())] == [("blocked_gradient", "Blocked")]


class Blocked(nn.Module):
    def forward(self, x):
        return x.detach() * 2


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_blocks_the_gradient() -> None:
    net = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval(), {nn.Linear}, dtype=torch.qint8
    )
    found = {f.kind: f.module for f in audit_task_model(net, image())}
    assert found["blocked_gradient"] == "1"


@pytest.mark.parametrize("wrap", [lambda t: (t, t), lambda t: [t], lambda t: {"a": t}], ids=["tuple", "list", "dict"])
@pytest.mark.parametrize("kind", ["blocked_gradient", "zero_gradient", "nan_gradient"])
def test_gradients_are_looked_at_behind_a_nest_too(wrap, kind) -> None:
    function = {
        "blocked_gradient": lambda x: wrap(x.detach()),
        "zero_gradient": lambda x: wrap(x.round()),
        "nan_gradient": lambda x: wrap((x - x.mean((2, 3), keepdim=True)).square().sum((2, 3)).sqrt()),
    }[kind]
    net = make(function, after=False)
    net.stem = nn.Conv2d(1, 3, 1)
    net.head = nn.Sequential()
    assert {f.kind for f in audit_task_model(net, image())} == {"output_type", kind}


def test_batch_statistics_are_found_in_a_list_in_a_module_and_behind_a_transpose() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.flatten(2).permute(2, 0, 1)

    (finding,) = audit_task_model(Hidden(), image())
    assert (finding.kind, finding.module) == ("batch_statistics", "layers[1]")


def test_a_function_that_drops_out_is_found_where_the_network_computes_its_own_loss() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return F.dropout(self.query(x), 0.5, self.training)

    class OwnLoss(nn.Module):
        def __init__(self, needs_label: bool) -> None:
            super().__init__()
            self.body, self.needs_label = Attention(), needs_label

        def forward(self, x, label=None):
            if label is None and self.needs_label:
                raise ValueError("no label")
            logits = self.body(x)
            return logits if label is None else F.cross_entropy(logits, label)

    x = image()
    for needs_label in (False, True):
        net = OwnLoss(needs_label)
        frozen = TaskOrientedLoss(net, None).task_model
        example = (x, torch.zeros(2, 6, 6, dtype=torch.long))
        assert [(f.kind, f.module) for f in audit_task_model(frozen, example)] == [("random", "body")]
        assert audit_task_model(net, example) == ()
    assert [f.module for f in audit_task_model(TaskOrientedLoss(OwnLoss(False), None).task_model, x)] == ["body"]
