"""The compared denoisers: what each recipe is made of, and laws of the networks and filters."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from examples.tod_net_ct.networks import baselines, perceptual
from examples.tod_net_ct.networks.task_networks import VoxResNet
from examples.tod_net_ct.run import Settings
from examples.tod_net_ct.training import recipes as denoisers
from taskloss import GradientPenalty, WeightClipping

SMALL = replace(Settings(), shape=(8, 16, 16), critic_channels=(2, 2, 2), width=2)
WIDE = replace(SMALL, critic_channels=(3, 5, 7))
CRITIC = [(1, 3, (3, 3, 3), (2, 2, 2)), (3, 5, (3, 3, 3), (2, 2, 2)), (5, 7, (3, 3, 3), (1, 1, 1))]


def convolutions(network: nn.Module) -> list[tuple]:
    """Channels in and out, kernel and stride of every convolution, in order."""
    convs = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    return [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in convs]


@pytest.mark.parametrize("name", ["tod_net", "sacnn_mse", "cnn_mse"])
def test_each_recipe_has_the_network_of_its_paper_at_the_width_of_the_settings(name) -> None:
    network = denoisers.network_of(denoisers.RECIPES[name], replace(Settings(), width=32))
    sizes = [(before, after, kernel) for before, after, kernel, _ in convolutions(network)]
    if name == "tod_net":
        widths = [1, 32, 64, 128, 256, 128, 64, 32, 1]
        assert sizes == [(a, b, (3, 3, 3)) for a, b in zip(widths, widths[1:], strict=False)]
    elif name == "cnn_mse":
        assert sizes == [(1, 64, (3, 9, 9)), (64, 32, (3, 3, 3)), (32, 1, (3, 5, 5))]
    else:
        attentions = [m for m in network.layers if isinstance(m, baselines.SelfAttention3d)]
        assert [attention.value.out_channels for attention in attentions] == [32, 16, 32]
        assert [m.out_channels for m in network.layers if isinstance(m, nn.Conv3d)] == [64, 32, 16, 32, 64, 1]


def test_attention_starts_as_the_identity_and_averages_values() -> None:
    torch.manual_seed(0)
    attention = baselines.SelfAttention3d(4, grid=4)
    x = torch.rand(2, 4, 3, 8, 8)
    assert torch.equal(attention(x), x)
    with torch.no_grad():
        attention.gamma.fill_(1.0)
        attention.value.weight.zero_()
        attention.value.bias.copy_(torch.arange(4.0))
    # Equal values stay what they are under any weights that add up to one: once in the plane, once in depth.
    assert torch.allclose(attention(x) - x, 2 * torch.arange(4.0).view(1, 4, 1, 1, 1).expand_as(x), atol=1e-5)


def test_attention_in_depth_sees_the_slices_of_one_position_alone() -> None:
    torch.manual_seed(0)
    attention = baselines.SelfAttention3d(2)
    x = torch.rand(1, 2, 4, 5, 6, requires_grad=True)
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    for name, moves_along in (("_depth", 2), ("_plane", 3)):
        v = value.detach().requires_grad_()
        getattr(attention, name)(query.detach(), key.detach(), v)[0, 0, 1, 2, 3].backward()
        seen = (v.grad[0, 0] != 0).nonzero()
        if name == "_depth":
            assert seen[:, 1:].unique(dim=0).tolist() == [[2, 3]] and len(seen) == v.shape[moves_along]
        else:
            assert seen[:, 0].unique().tolist() == [1] and len(seen) == 5 * 6


def test_every_head_of_vox_resnet_counts() -> None:
    network = VoxResNet(2)
    network(torch.rand(1, 1, 4, 16, 16)).square().sum().backward()
    assert all(bool(head[2].weight.grad.any()) for head in network.heads)


def test_networks_keep_the_size() -> None:
    volume, slices = torch.rand(1, 1, 3, 12, 20), torch.rand(2, 1, 12, 20)
    assert baselines.ThreeLayerCNN(4)(volume).shape == volume.shape
    assert baselines.SelfAttentionDenoiser(1)(volume).shape == volume.shape
    assert baselines.Autoencoder(2)(slices).shape == slices.shape
    assert perceptual.as_images(volume).shape == (3, 3, 12, 20)
    assert torch.equal(perceptual.as_slices(volume)[1, 0], volume[0, 0, 1])


@pytest.mark.parametrize("name", ["nlm", "bm3d"])
def test_filters_take_noise_away(name) -> None:
    pytest.importorskip("skimage")
    if name == "bm3d" and find_spec("bm3d") is None:
        with pytest.raises(ValueError, match="bm3d: the package is not installed; pip install bm3d"):
            baselines.bm3d(torch.rand(1, 16, 16), 0.1)
        return
    torch.manual_seed(0)
    clean = torch.full((1, 32, 32), 0.5)
    noisy = clean + 0.1 * torch.randn_like(clean)
    found = denoisers.FILTERS[name][1](noisy, 0.1)
    assert float((found - clean).square().mean()) < 0.3 * float((noisy - clean).square().mean())


def test_each_recipe_has_the_critic_of_its_paper() -> None:
    clipped = denoisers.critic_of(denoisers.RECIPES["tod_net"], replace(WIDE, clip=0.02))
    assert isinstance(clipped.constraint, WeightClipping) and clipped.constraint.clip == 0.02
    assert convolutions(clipped) == CRITIC
    assert [m.num_features for m in clipped.modules() if isinstance(m, nn.BatchNorm3d)] == [3, 5, 7]
    for name in ("vgg_wgan", "sa_wgan"):
        critic = denoisers.critic_of(denoisers.RECIPES[name], replace(WIDE, penalty_weight=7.0))
        assert isinstance(critic.constraint, GradientPenalty) and critic.constraint.weight == 7.0
        assert convolutions(critic) == CRITIC
        assert not [m for m in critic.modules() if "Norm" in type(m).__name__], (
            "a penalty wants samples that do not mix"
        )
        (head,) = [m for m in critic.modules() if isinstance(m, nn.Linear)]
        assert (head.in_features, head.out_features) == (7 * 1 * 2 * 2, 1)
    assert denoisers.critic_of(denoisers.RECIPES["cnn_mse"], SMALL) is None


def test_settings_of_the_critic_reach_it() -> None:
    recipe = denoisers.RECIPES["mse_wgan"]
    assert not denoisers.critic_of(recipe, SMALL).constraint.skip_norm
    assert denoisers.critic_of(recipe, replace(SMALL, clip_norm_layers=False)).constraint.skip_norm
    instance = denoisers.critic_of(recipe, replace(WIDE, critic_norm="instance"))
    norms = [m for m in instance.modules() if "Norm" in type(m).__name__]
    assert [(type(m), m.num_features, m.affine) for m in norms] == [(nn.InstanceNorm3d, n, True) for n in (3, 5, 7)]
    assert convolutions(instance) == CRITIC
    assert instance(torch.rand(2, 1, *SMALL.shape)).shape == (2,)
    with pytest.raises(ValueError, match="critic_norm: expected batch, instance or none, got 'group'"):
        denoisers.critic_of(recipe, replace(SMALL, critic_norm="group"))


def test_an_unknown_perceptual_network_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="perceptual_network: expected efficientnet or vgg19, got 'vgg16'"):
        perceptual.perceptual_loss("vgg16")
