"""Laws and errors of `examples.tod_net_ct.denoise`."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.tod_net_ct.denoise import add_arguments, denoise_file, denoise_volume, main
from examples.tod_net_ct.networks import Denoiser, save_checkpoint
from examples.tod_net_ct.volumes import read_scan, to_hu, to_unit

nib = pytest.importorskip("nibabel")

WINDOW_HU = (-200.0, 200.0)


def identity_(network):
    nn.init.zeros_(network.narrow[-1].weight)
    nn.init.zeros_(network.narrow[-1].bias)
    return network.eval()


def body_hu(shape=(18, 20, 19), seed=0):
    """Air, soft tissue and bone, so that every tile mixes voxels inside and outside the window."""
    noise_hu = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.linspace(-1, 1, shape[2]).abs() > 0.9, -1000.0, 150 * noise_hu)


def seeded(norm="instance", width=1):
    torch.manual_seed(1)
    network = Denoiser(width, norm=norm)
    network(torch.rand(2, 1, 6, 6, 6))  # batch norm: statistics that are not 0 and 1
    return network.eval()


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "denoiser.pt", seeded())


@pytest.fixture
def source(tmp_path):
    voxels = body_hu((8, 9, 10)).permute(2, 1, 0).round().numpy().astype(np.int16)
    affine = np.array([[0, -0.8, 0, 5], [0.7, 0, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    nib.Nifti1Image(voxels, affine).to_filename(tmp_path / "volume-1.nii.gz")
    return tmp_path / "volume-1.nii.gz"


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("tile", [(18, 20, 19), (6, 20, 19), (10, 11, 12), (18, 7, 19)], ids=str)
def test_tiled_equals_untiled(norm, tile):
    network, volume_hu = seeded(norm), body_hu()
    with torch.no_grad():
        plain = network(to_unit(volume_hu)[None, None])[0, 0].clamp(0, 1)
    inside = (volume_hu >= -200) & (volume_hu <= 200)
    result_hu = denoise_volume(network, volume_hu, WINDOW_HU, tile)
    torch.testing.assert_close(to_unit(result_hu)[inside], plain[inside], rtol=0, atol=1e-5)
    assert not torch.allclose(result_hu, volume_hu, atol=1.0)  # it did something


def test_statistics_of_each_tile_are_another_result():
    volume_hu = body_hu()
    whole, tilewise = (
        denoise_volume(seeded(), volume_hu, WINDOW_HU, (9, 20, 10), statistics=kind) for kind in ("whole", "tile")
    )
    assert (whole - tilewise).abs().max() > 0.1


@pytest.mark.parametrize("tile", [None, (10, 11, 12)])
def test_outside_the_window_nothing_changes_and_inside_nothing_leaves(tile):
    network, volume_hu = seeded(), body_hu()
    nn.init.constant_(network.narrow[-1].bias, 5.0)  # far beyond the window
    volume_hu[0, 0, :4] = torch.tensor(
        [-200.0, 200.0, 200.0001, float(np.nextafter(np.float32(-200), np.float32(-300)))]
    )
    result_hu = denoise_volume(network, volume_hu, WINDOW_HU, tile)
    far = (volume_hu < -400) | (volume_hu > 400)
    inside = (volume_hu >= -200) & (volume_hu <= 200)
    assert far.any()
    assert torch.equal(result_hu[far], volume_hu[far])
    assert (result_hu[inside] == 200).all()


def test_identity_network_returns_the_volume():
    volume_hu = body_hu().round()
    result_hu = denoise_volume(identity_(seeded()), volume_hu, WINDOW_HU, (9, 20, 19))
    assert torch.equal(result_hu.round(), volume_hu)
    torch.testing.assert_close(result_hu, volume_hu, rtol=0, atol=1e-4)


def test_one_slice_and_a_volume_of_air():
    volume_hu = body_hu((1, 12, 12))
    assert denoise_volume(seeded(), volume_hu).shape == (1, 12, 12)
    air_hu = torch.full((3, 4, 5), -1000.0)
    assert torch.equal(denoise_volume(seeded(), air_hu), air_hu)


def test_the_caller_s_network_and_volume_are_left_as_found():
    network, volume_hu = seeded().train(), body_hu()
    state, before = {k: v.clone() for k, v in network.state_dict().items()}, volume_hu.clone()
    denoise_volume(network, volume_hu, WINDOW_HU, (9, 20, 19))
    assert network.training
    assert all(norm.running_mean is None and not norm.track_running_stats for norm in network.norms)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(volume_hu, before)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_progress_grows_to_one(norm):
    shares = []
    denoise_volume(seeded(norm), body_hu(), WINDOW_HU, (9, 20, 19), progress=shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == pytest.approx(1)


def test_memory_budget_bounds_what_the_network_sees():
    network, seen = seeded("none"), []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    whole_hu = denoise_volume(network, body_hu((40, 40, 40)))
    assert seen == [64_000]
    seen.clear()
    budget_gib = 20_000 * network.bytes_per_voxel / 2**30
    tiled_hu = denoise_volume(network, body_hu((40, 40, 40)), memory_gib=budget_gib)
    assert len(seen) > 1
    assert max(seen) <= 20_000
    torch.testing.assert_close(to_unit(tiled_hu), to_unit(whole_hu), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="memory_gib: expected room for a tile, got 1e-06 GiB; give more, or --tile"):
        denoise_volume(network, body_hu((40, 40, 40)), memory_gib=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": (4, 0, 4)}, r"tile: expected slices, rows and columns of at least 1, got \(4, 0, 4\)"),
        ({"tile": (4, 4)}, r"tile: expected slices, rows and columns"),
        ({"statistics": "none"}, "statistics: expected one of .*, got 'none'; 'whole' leaves no seams"),
        ({"device": "abacus"}, "device: expected one that torch can use, got 'abacus'; use --device cpu"),
        ({"window_hu": (5, 5)}, "window_hu: expected"),
    ],
)
def test_bad_option(options, words):
    with pytest.raises(ValueError, match=words):
        denoise_volume(seeded(), body_hu((3, 4, 5)), **options)


def test_bad_volume_and_too_little_memory():
    with pytest.raises(ValueError, match=r"volume_hu: expected \(D, H, W\), got \(1, 3, 4, 5\); denoise one volume"):
        denoise_volume(seeded(), body_hu((3, 4, 5))[None])
    with pytest.raises(ValueError, match="volume_hu: expected finite HU, got NaN or infinity"):
        denoise_volume(seeded(), torch.full((3, 4, 5), float("nan")))

    class Hungry(Denoiser):
        def forward(self, image):
            raise torch.OutOfMemoryError

    with pytest.raises(
        ValueError, match="cpu: expected memory for tiles of 3x4x5, got too little; give a smaller --tile"
    ):
        denoise_volume(Hungry(1), body_hu((3, 4, 5)))


@pytest.mark.parametrize("output", ["out.nii", "out.nii.gz"])
def test_file_keeps_geometry_and_voxels_outside_the_window(tmp_path, checkpoint, source, output):
    denoise_file(checkpoint, source, tmp_path / output, tile=(5, 6, 7))
    stored, written = nib.load(source), nib.load(tmp_path / output)
    assert written.header == stored.header
    assert np.array_equal(written.affine, stored.affine)
    before, after = np.asarray(stored.dataobj), np.asarray(written.dataobj)
    outside = (before < -400) | (before > 400)
    assert np.array_equal(after[outside], before[outside])
    assert (after[~outside] != before[~outside]).mean() > 0.5


def test_identity_file_is_the_input(tmp_path, source):
    checkpoint = save_checkpoint(tmp_path / "identity.pt", identity_(Denoiser(1)))
    denoise_file(checkpoint, source, tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(nib.load(source).dataobj), np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj))


def test_the_checkpoint_s_window_rules(tmp_path, source):
    checkpoint = save_checkpoint(tmp_path / "narrow.pt", seeded(), window_hu=(0, 50))
    denoise_file(checkpoint, source, tmp_path / "out.nii")
    before_hu, after_hu = read_scan(source).volume_hu, read_scan(tmp_path / "out.nii").volume_hu
    changed = before_hu != after_hu
    assert changed.any()
    assert -25 <= before_hu[changed].min() <= before_hu[changed].max() <= 75
    assert 0 <= after_hu[changed].min() <= after_hu[changed].max() <= 50


def test_refuses_to_lose_a_file(tmp_path, checkpoint, source):
    (tmp_path / "other.nii.gz").write_bytes(b"precious")
    (tmp_path / "link.nii.gz").hardlink_to(source)
    with pytest.raises(ValueError, match="^other.nii.gz: expected a new file, got one that exists; add --overwrite"):
        denoise_file(checkpoint, source, tmp_path / "other.nii.gz")
    assert (tmp_path / "other.nii.gz").read_bytes() == b"precious"
    for same in (source, source.parent / "." / source.name, tmp_path / "link.nii.gz"):
        with pytest.raises(ValueError, match="nii.gz: expected another file than the input, got the input itself"):
            denoise_file(checkpoint, source, same, overwrite=True)
    denoise_file(checkpoint, source, tmp_path / "other.nii.gz", overwrite=True)
    assert read_scan(tmp_path / "other.nii.gz").volume_hu.shape == (8, 10, 9)


def test_a_failure_leaves_no_output(tmp_path, checkpoint, source, monkeypatch):
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Denoiser, "forward", lambda self, image: image * float("nan"))
    with pytest.raises(ValueError, match="out.nii.gz: expected finite HU to write, got NaN"):
        denoise_file(checkpoint, source, tmp_path / "out.nii.gz")
    assert sorted(tmp_path.iterdir()) == before


def test_command_line(tmp_path, checkpoint, source, capsys):
    pytest.importorskip("rich")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--checkpoint", checkpoint, "--input", source, "--output", tmp_path / "out.nii", "--tile", 5, 6, 7]
    assert main(parser.parse_args([str(word) for word in words])) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path / 'out.nii'}\n"
    assert "volume-1.nii.gz" in printed.err  # the progress bar's title
    with pytest.raises(ValueError, match="^gone.nii: expected a NIfTI file, got none at"):
        denoise_file(checkpoint, tmp_path / "gone.nii", tmp_path / "new.nii")


@pytest.mark.skipif("TASKLOSS_CT_DATA" not in os.environ, reason="TASKLOSS_CT_DATA names no folder of real CT")
def test_real_slice(tmp_path, checkpoint):
    source = sorted((Path(os.environ["TASKLOSS_CT_DATA"]) / "paired").glob("*_quarter.nii.gz"))[0]
    denoise_file(checkpoint, source, tmp_path / "out.nii.gz")
    stored, written = nib.load(source), nib.load(tmp_path / "out.nii.gz")
    assert written.header == stored.header
    before, after = np.asarray(stored.dataobj), np.asarray(written.dataobj)
    outside = (before < -400) | (before > 400)
    assert np.array_equal(after[outside], before[outside])


def test_hu_and_unit_agree_at_the_ends():
    assert to_hu(torch.tensor([0.0, 1.0])).tolist() == list(WINDOW_HU)


class Constant(Denoiser):
    """Restores everything to one value."""

    def __init__(self, unit: float) -> None:
        super().__init__(1, norm="none")
        self.unit = unit

    def forward(self, image):
        return torch.full_like(image, self.unit)


@pytest.mark.parametrize(
    ("given_hu", "restored_hu", "expected_hu"),
    [
        (350.0, 60.0, 60.0),  # tissue that noise carried out
        (350.0, 180.0, 350.0),  # bone: the network says it lies at the window's end
        (401.0, 60.0, 401.0),  # beyond noise
        (-350.0, -100.0, -100.0),
        (-350.0, -170.0, -350.0),
        (-1000.0, 60.0, -1000.0),
        (150.0, 60.0, 60.0),
    ],
)
def test_an_outlier_comes_back_only_if_the_network_sees_tissue(given_hu, restored_hu, expected_hu):
    volume_hu = torch.full((2, 3, 4), 10.0)
    volume_hu[1, 1, 1] = given_hu
    result_hu = denoise_volume(Constant((restored_hu + 200) / 400), volume_hu)
    assert float(result_hu[1, 1, 1]) == pytest.approx(expected_hu, abs=1e-3)
