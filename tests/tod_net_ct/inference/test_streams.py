"""Laws of `examples.tod_net_ct.inference.streams` and `moments`: equal to the untiled network, within the budget."""

import copy
import math

import pytest
import torch
from torch import nn

from examples.tod_net_ct.dose import to_unit
from examples.tod_net_ct.inference import denoise_volume, streams, tiles
from examples.tod_net_ct.inference.moments import Moments
from examples.tod_net_ct.networks import Denoiser

SHAPE = (19, 31, 30)


def body_hu(shape=SHAPE):
    return 150 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def seeded(width=4, **options):
    torch.manual_seed(1)
    return Denoiser(width, **options).eval()


def budget_gib(network, shape, kept, slab):
    """The smallest budget in which so much is kept."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        found = streams.room(network, shape, middle * 2**30)
        low, high = (low, middle) if found is not None and found >= (kept, slab) else (middle, high)
    assert streams.room(network, shape, high * 2**30) == (kept, slab)
    return high


def plain(network, volume_hu):
    with torch.no_grad():
        return network(to_unit(volume_hu)[None, None])[0, 0]


@pytest.mark.parametrize("shape", [(19, 31, 30), (2, 9, 7), (1, 12, 5), (5, 1, 1), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("kept_channels", [32, 16, 8, 4, 0])
@pytest.mark.parametrize("slab", [4, 1])
@torch.no_grad()
def test_streamed_equals_untiled(shape, kept_channels, slab):
    network, volume_hu = seeded(), body_hu(shape)
    if shape[1:] == (1, 1):  # a variance of few voxels: rounding is scaled up by its inverse
        volume_hu *= 10
    restored, seen = torch.full(shape, math.nan), []
    run = streams.Streams(network, lambda part: to_unit(volume_hu[part]), shape, kept_channels, slab).run(seen.append)
    for part, slices in run:
        restored[part] = slices
    torch.testing.assert_close(restored, plain(network, volume_hu), rtol=0, atol=1e-5)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


@pytest.mark.parametrize(("kept", "slab"), [(32, 4), (32, 1), (16, 1), (8, 1), (4, 1), (0, 1)])
@pytest.mark.parametrize("options", [{}, {"residual": False}, {"final_activation": "tanh"}], ids=str)
def test_every_budget_gives_the_untiled_result(monkeypatch, kept, slab, options):
    network, volume_hu, taken = seeded(**options), body_hu((16, 80, 80)), []
    monkeypatch.setattr(tiles, "Streams", lambda *args: taken.append(args[3:]) or streams.Streams(*args))
    if (kept, slab) not in possible(network, volume_hu.shape):
        pytest.skip("a larger part is kept as soon as this one fits")
    memory_gib = budget_gib(network, volume_hu.shape, kept, slab)
    state = copy.deepcopy(network.train().state_dict())
    result_hu = denoise_volume(network, volume_hu, memory_gib=memory_gib)
    assert taken == [(kept, slab)]
    inside = volume_hu.abs() <= 200
    expected = plain(network.eval(), volume_hu).clamp(0, 1)
    torch.testing.assert_close(to_unit(result_hu)[inside], expected[inside], rtol=0, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(norm.running_mean is None and not norm.track_running_stats for norm in network.norms)


def possible(network, shape):
    found = (streams.room(network, shape, k * 2**30 / 4000) for k in range(1, 4000))
    return {pair for pair in found if pair is not None}


@pytest.mark.parametrize("kept", [32, 0])
def test_features_alive_do_not_grow_with_the_slices(monkeypatch, kept):
    """A convolution sees a slab and its two neighbours, whatever the number of slices."""
    network, seen = seeded(), []
    real = streams._conv3d
    monkeypatch.setattr(streams, "_conv3d", lambda x, *rest: seen.append(x.shape[2]) or real(x, *rest))
    for n in (9, 40):
        run = streams.Streams(network, lambda part: torch.zeros(part.stop - part.start, 8, 8), (n, 8, 8), kept, 4)
        with torch.no_grad():
            assert sum(part.stop - part.start for part, _ in run.run(lambda share: None)) == n
        assert max(seen) == 6
    assert run._kept.numel() == 40 * 64 * kept


@pytest.mark.parametrize(
    "gib", [0.7, pytest.param(0.16, marks=pytest.mark.slow), pytest.param(0.125, marks=pytest.mark.slow)]
)
def test_the_budget_is_kept(gib):
    from benchmarks.harness import peak_bytes

    shape = (16, 256, 256)
    network, volume_hu = seeded(), body_hu(shape)
    assert streams.room(network, shape, gib * 2**30) is not None
    peak = peak_bytes(lambda: denoise_volume(network, volume_hu, memory_gib=gib), torch.device("cpu"))
    assert peak <= gib * 2**30 + 3 * volume_hu.numel() * 4


def test_more_room_means_less_work():
    network = seeded()
    shares = [sum(streams.Streams(network, lambda p: p, SHAPE, kept)._costs()) for kept in (32, 16, 8, 4, 0)]
    assert shares == sorted(shares)
    assert shares[-1] > 3 * shares[0]


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_other_norms_and_other_networks_take_tiles(norm):
    class Other(Denoiser):
        def forward(self, image):
            return image

    assert streams.room(seeded(norm=norm), SHAPE, 1e12) is None
    assert streams.room(Other(4), SHAPE, 1e12) is None
    assert streams.room(seeded(), SHAPE, 1e12) == (32, 4)
    assert streams.room(seeded(), SHAPE, 1e3) is None


def test_moments_of_parts_are_those_of_the_whole():
    features = 3 * torch.randn(7, 8, 9, 5) + 1000 * torch.arange(5)
    moments = Moments()
    for part in features.split(3):
        moments.add(part)
    variance, mean = torch.var_mean(features.double().flatten(0, 2), 0, correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance, variance, rtol=1e-4, atol=0)
    assert moments.count == 7 * 8 * 9


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    network, volume_hu = seeded(), body_hu((40, 40, 40))
    memory_gib = 40_000 * network.bytes_per_voxel / 2**30
    assert streams.room(network, volume_hu.shape, memory_gib * 2**30) is not None
    on_gpu = denoise_volume(network, volume_hu, device="cuda", memory_gib=memory_gib)
    torch.testing.assert_close(to_unit(on_gpu), to_unit(denoise_volume(network, volume_hu)), rtol=0, atol=1e-4)


def test_layers_keep_their_own_slope_and_order():
    """What `Streams` takes for granted of `Denoiser`: eight convolutions of 3x3x3, three skips, no affine norms."""
    network = seeded()
    assert len(network.widen) == len(network.narrow) == 4
    assert all(conv.kernel_size == (3, 3, 3) for conv in (*network.widen, *network.narrow))
    assert all(isinstance(norm, nn.InstanceNorm3d) and not norm.affine for norm in network.norms)
