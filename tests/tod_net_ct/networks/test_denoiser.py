"""Laws and errors of `examples.tod_net_ct.networks`."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from examples.tod_net_ct.networks import Denoiser, load_denoiser, load_weights, save_checkpoint, unet, write_weights
from examples.tod_net_ct.networks.denoiser import UNET_SIDE_MULTIPLE
from examples.tod_net_ct.run import Settings
from examples.tod_net_ct.training import recipes as denoisers


def identity_(network):
    nn.init.zeros_(network.narrow[-1].weight)
    nn.init.zeros_(network.narrow[-1].bias)
    return network.eval()


def test_the_paper_s_size():
    assert sum(p.numel() for p in Denoiser().parameters()) == 2_324_865


def test_layers_follow_the_published_order():
    """The forward pass, written out once more by hand for width 1."""
    torch.manual_seed(0)
    network = Denoiser(1, final_activation="tanh").eval()
    image = torch.rand(1, 1, 4, 5, 6)

    def norm(x):
        return (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()

    def act(x):
        return torch.where(x > 0, x, 0.2 * x)

    c1 = act(norm(network.widen[0](image)))
    c2 = act(norm(network.widen[1](c1)))
    c3 = act(norm(network.widen[2](c2)))
    c4 = act(norm(network.widen[3](c3)))
    d1 = act(norm(network.narrow[0](c4) + c3))
    d2 = act(norm(network.narrow[1](d1) + c2))
    d3 = act(norm(network.narrow[2](d2) + c1))
    expected = torch.tanh(network.narrow[3](d3) + image)
    torch.testing.assert_close(network(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_identity_is_representable_unless_tanh(norm):
    image = torch.rand(2, 1, 3, 4, 5)
    assert torch.equal(identity_(Denoiser(2, norm=norm))(image), image)
    assert not torch.allclose(identity_(Denoiser(2, norm=norm, final_activation="tanh"))(image), image, atol=1e-3)
    assert not identity_(Denoiser(2, norm=norm, residual=False))(image).any()


def test_receptive_radius_is_eight_and_no_more():
    torch.manual_seed(0)
    network = Denoiser(2, norm="none").double()
    image = torch.rand(1, 1, 1, 1, 41, dtype=torch.float64, requires_grad=True)
    network(image)[0, 0, 0, 0, 20].backward()
    reached = image.grad[0, 0, 0, 0].nonzero().flatten()
    assert (
        (20 - int(reached[0]), int(reached[-1]) - 20) == (network.receptive_radius, network.receptive_radius) == (8, 8)
    )


def test_norms_are_listed_in_the_order_they_run():
    network, order = Denoiser(1), []
    for index, norm in enumerate(network.norms):
        norm.register_forward_hook(lambda *_, index=index: order.append(index))
    network(torch.rand(1, 1, 3, 3, 3))
    assert order == list(range(7))


def test_gradient_reaches_every_weight_and_the_input_is_left():
    network, image = Denoiser(2, norm="none"), torch.rand(1, 1, 4, 4, 4)
    before = image.clone()
    network(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "layer"}, "Denoiser: expected norm in .*'instance'.*, got 'layer'"),
        (
            {"final_activation": "clamp"},
            "expected final_activation in .*got 'clamp'; 'none' can represent the identity",
        ),
        ({"width": 0}, "expected a width of at least 1, got 0"),
    ],
)
def test_unknown_option(options, words):
    with pytest.raises(ValueError, match=words):
        Denoiser(**options)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"expected \(N, 1, D, H, W\), got \(4, 5, 6\); add axes"):
        Denoiser(1)(torch.rand(4, 5, 6))


def test_checkpoint_round_trip(tmp_path):
    network = Denoiser(2, norm="batch", residual=False, final_activation="tanh")
    network(torch.rand(2, 1, 4, 4, 4))  # moves the running statistics
    facts = {"seed": 3, "scores": [0.5, None], "optimiser": {"name": "RMSprop", "lr": 5e-4}}
    path = save_checkpoint(tmp_path / "d.pt", network, window_hu=(-100, 300), **facts)
    loaded = load_denoiser(path)
    assert loaded.config == network.config
    assert loaded.facts == {"window_hu": (-100.0, 300.0), **facts}
    assert not loaded.training
    image = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(loaded(image), network.eval()(image))
    assert [p.name for p in tmp_path.iterdir()] == ["d.pt"]


@pytest.mark.parametrize("value", [np.float64(1), torch.zeros(1), {1: 2}, object()], ids=lambda v: type(v).__name__)
def test_facts_are_plain(tmp_path, value):
    with pytest.raises(ValueError, match="save_checkpoint: expected plain values, got score of type .*; convert it"):
        save_checkpoint(tmp_path / "d.pt", Denoiser(1), score=value)
    assert not list(tmp_path.iterdir())


def test_a_failing_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "d.pt", Denoiser(1))
    earlier = path.read_bytes()

    def half(_content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, Denoiser(1))
    assert [p.name for p in tmp_path.iterdir()] == ["d.pt"]
    assert path.read_bytes() == earlier


class Stranger:
    ran = False

    def __reduce__(self):
        return (setattr, (Stranger, "ran", True))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_a_stranger_s_pickle_is_refused_and_does_not_run(tmp_path, legacy):
    path = tmp_path / "d.pt"
    if legacy:
        path.write_bytes(pickle.dumps(Stranger()))
    else:
        torch.save(Stranger(), path)
    with pytest.raises(
        ValueError, match="^d.pt: expected a denoiser's checkpoint, got another file, which is not unpi"
    ):
        load_denoiser(path)
    assert not Stranger.ran


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path, keep):
    path = save_checkpoint(tmp_path / "d.pt", Denoiser(1))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(
        ValueError, match="^d.pt: expected a denoiser's checkpoint, got a truncated or damaged file; cop"
    ):
        load_denoiser(path)


def test_other_checkpoints(tmp_path):
    path = tmp_path / "d.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match="^d.pt: expected a denoiser's checkpoint .*, got other contents; give a file"):
        load_denoiser(path)
    save_checkpoint(path, Denoiser(1))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "state_dict": Denoiser(2).state_dict()}, path)
    with pytest.raises(
        ValueError, match="^d.pt: expected a denoiser's checkpoint, got the weights of another architecture"
    ):
        load_denoiser(path)
    content["state_dict"]["widen.0.bias"].fill_(float("nan"))
    torch.save(content, path)
    with pytest.raises(ValueError, match="^d.pt: expected finite weights, got NaN or infinity; take an earlier"):
        load_denoiser(path)
    with pytest.raises(ValueError, match="^gone.pt: expected a denoiser's checkpoint, got no file at"):
        load_denoiser(tmp_path / "gone.pt")


def test_unet_keeps_the_size():
    pytest.importorskip("monai")
    sides = (UNET_SIDE_MULTIPLE, 2 * UNET_SIDE_MULTIPLE, 3 * UNET_SIDE_MULTIPLE)
    network = unet(width=2).eval()
    assert network(torch.rand(1, 1, *sides)).shape == (1, 2, *sides)
    with pytest.raises(ValueError, match="unet: expected a width of at least 1, got 0"):
        unet(width=0)


def test_import_needs_neither_nibabel_nor_monai():
    import subprocess
    import sys

    code = "import sys, examples.tod_net_ct.inference; sys.exit(bool({'monai', 'nibabel', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_recomputed_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 16, 16)
    gradients, calls = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        network = Denoiser(4)
        network.recompute = recompute
        seen: list[int] = []
        network.widen[2].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        network(image).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        calls.append(len(seen))
    assert calls == [1, 2], "once more in the backward pass"
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)
    with pytest.raises(ValueError, match="recompute: batch norm"):
        denoisers.network_of(denoisers.RECIPES["tod_net"], replace(Settings(), recompute=True, norm="batch"))


def flip_a_bit_of(path, tensor):
    """Change one bit of a weight where it lies in the file."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.detach().numpy().tobytes()[:40]) + 2] ^= 0x40
    path.write_bytes(content)


def test_a_flipped_bit_in_a_weight_is_told(tmp_path):
    network = Denoiser(2)
    path = save_checkpoint(tmp_path / "d.pt", network)
    flip_a_bit_of(path, network.widen[2].weight)
    with pytest.raises(ValueError, match="^d.pt: expected a denoiser's checkpoint, got a truncated or damaged file"):
        load_denoiser(path)


def test_a_flipped_bit_in_an_export_is_told(tmp_path):
    pytest.importorskip("safetensors")
    network = load_denoiser(save_checkpoint(tmp_path / "d.pt", Denoiser(2)))
    path = write_weights(tmp_path, network)
    assert torch.equal(load_weights(path).widen[2].weight, network.widen[2].weight)
    flip_a_bit_of(path, network.widen[2].weight)
    with pytest.raises(
        ValueError, match="^denoiser.safetensors: expected the weights as `export` wrote them, got others"
    ):
        load_weights(path)
