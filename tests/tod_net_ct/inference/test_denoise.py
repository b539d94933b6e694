"""Laws and errors of the command `denoise`."""

import argparse
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.tod_net_ct.dose import to_hu, to_unit
from examples.tod_net_ct.inference import denoise_volume
from examples.tod_net_ct.inference.denoise import add_arguments, denoise_file, main
from examples.tod_net_ct.networks import Denoiser, save_checkpoint
from examples.tod_net_ct.scans import read_scan

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


# Tiles and memory


@pytest.mark.parametrize("shape", [(450, 512, 512), (1, 512, 512), (75, 333, 1), (7, 9, 8)], ids=str)
def test_best_size_fits_and_covers(shape):
    from examples.tod_net_ct.inference.tiles import best_size, cut

    for max_voxels in (30_000, 1_000_000):
        size = best_size(shape, 8, max_voxels)
        covered = 0
        for part in cut(shape, size, 8):
            assert math.prod(s.stop - s.start for s in part.read) <= max_voxels
            covered += math.prod(s.stop - s.start for s in part.core)
        assert covered == math.prod(shape)
    assert best_size((450, 512, 512), 8, 1000) is None


def test_best_size_reads_little_beside_its_cores():
    from examples.tod_net_ct.inference.tiles import best_size, cut

    size = best_size((450, 512, 512), 8, 1_000_000)
    read = sum(math.prod(s.stop - s.start for s in part.read) for part in cut((450, 512, 512), size, 8))
    assert read < 1.6 * 450 * 512 * 512


def test_statistics_hold_one_tile_at_a_time(monkeypatch):
    """The features alive at once are those of one tile, whatever the number of tiles."""
    network, sizes = seeded(width=2), []
    real = torch.nn.Conv3d.forward

    def watched(self, x):
        out = real(self, x)
        sizes.append(out[0, 0].numel())
        return out

    monkeypatch.setattr(torch.nn.Conv3d, "forward", watched)
    denoise_volume(network, body_hu((40, 20, 19)), WINDOW_HU, (10, 20, 19))
    assert max(sizes) == 26 * 20 * 19  # a core of 10 slices and two halos of 8


def test_memory_gb_is_of_the_whole_program(checkpoint, source, tmp_path):
    with pytest.raises(ValueError, match="^memory_gb: expected more than 1.0 GB, got 0.5; give more --memory-gb"):
        denoise_file(checkpoint, source, tmp_path / "out.nii", memory_gb=0.5, device="cpu")
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 32])
def test_peak_memory_of_a_large_scan(tmp_path, width):
    """The peak of a whole process stays within --memory-gb; a small one here, so that it ends soon."""
    save_checkpoint(tmp_path / "wide.pt", seeded(width=width))
    voxels = body_hu((120, 128, 128)).permute(2, 1, 0).numpy().astype(np.int16)
    nib.Nifti1Image(voxels[:, :, : 120 if width == 2 else 24], np.eye(4)).to_filename(tmp_path / "in.nii.gz")
    words = ["denoise", "--checkpoint", tmp_path / "wide.pt", "--input", tmp_path / "in.nii.gz"]
    words += ["--output", tmp_path / "out.nii.gz", "--memory-gb", 1.6, "--device", "cpu", "--statistics", "tile"]
    code = "import sys, resource; from examples.tod_net_ct import __main__ as m; code = m.main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1.6


# DICOM


@pytest.fixture
def axial(tmp_path):
    pytest.importorskip("pydicom")
    from tests.tod_net_ct.scans.test_dicom import series_of

    return series_of(tmp_path / "axial", hu_of_body())


def hu_of_body():
    return body_hu((8, 9, 10)).round().numpy().astype(np.int16)


def test_dicom_and_nifti_routes_agree(tmp_path, checkpoint, axial):
    from examples.tod_net_ct.scans import read_series
    from tests.tod_net_ct.scans.test_dicom import as_nifti

    nifti = as_nifti(tmp_path / "same.nii.gz", hu_of_body())
    (made,) = denoise_file(checkpoint, axial, tmp_path / "out", tile=(5, 6, 7))
    denoise_file(checkpoint, axial, tmp_path / "out.nii.gz", tile=(5, 6, 7))
    denoise_file(checkpoint, nifti, tmp_path / "from-nifti.nii.gz", tile=(5, 6, 7))
    denoise_file(checkpoint, nifti, tmp_path / "templated", tile=(5, 6, 7), template=axial)
    expected = nib.load(tmp_path / "from-nifti.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, expected.affine, atol=1e-5)
    wanted_hu = read_scan(tmp_path / "from-nifti.nii.gz").volume_hu
    assert (wanted_hu != torch.from_numpy(hu_of_body())).float().mean() > 0.3
    for folder in (made, tmp_path / "templated"):
        assert torch.equal(read_series(folder).volume_hu, wanted_hu)
    assert torch.equal(read_scan(tmp_path / "out.nii.gz").volume_hu, wanted_hu)


def test_the_derivation_names_the_weights(tmp_path, checkpoint, axial):
    import hashlib

    import pydicom

    denoise_file(checkpoint, axial, tmp_path / "out")
    said = pydicom.dcmread(tmp_path / "out" / "slice-0001.dcm").DerivationDescription
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    assert said == f"Denoised with taskloss tod_net_ct, weights {digest}, HU window -200 to 200"


def read_uid(folder):
    import pydicom

    return pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID


@pytest.mark.parametrize("output", ["out.nii.gz", "out"])
def test_a_task_network_adds_its_label_map(tmp_path, checkpoint, axial, output):
    pytest.importorskip("monai")
    from examples.tod_net_ct.inference import segment
    from examples.tod_net_ct.networks import build, load_network, save_network
    from examples.tod_net_ct.scans import read_label

    save_network(tmp_path / "task.pt", build("unet", 2), "unet", 2, voxel_mm=[3.0, 1.5, 1.5])
    paths = denoise_file(checkpoint, axial, tmp_path / output, task=tmp_path / "task.pt")
    assert paths == [tmp_path / output, tmp_path / "out-label.nii.gz", tmp_path / "out-label.dcm"]
    scan, network = read_scan(paths[0]), load_network(tmp_path / "task.pt")
    assert nib.load(paths[1]).get_data_dtype() == np.uint8
    label = read_label(paths[1], like=read_scan(axial), allow_empty=True)  # on the scan's own grid
    again = segment(network, scan.volume_hu, scan.voxel_mm, [3.0, 1.5, 1.5])
    assert (label == again).float().mean() > 0.95  # the file's HU are rounded
    assert 0 < label.float().mean() < 1
    segmentation = pytest.importorskip("highdicom").seg.segread(paths[2])
    drawn = segmentation.get_volume(combine_segments=True).array
    assert drawn.sum() == int(label.sum()) and np.array_equal(np.sort(drawn.any((1, 2))), np.sort(label.any(2).any(1)))
    referred = segmentation.get_source_image_uids()[0][1]  # the series that was written, else the one that was read
    assert str(referred) == str(read_uid(paths[0] if output == "out" else axial))


def run(*words):
    from examples.tod_net_ct.__main__ import main as command

    return command(["denoise", *map(str, words)])


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, checkpoint, source, axial, capsys):
    from tests.tod_net_ct.scans.test_dicom import hu_at, make_slice, save, series_of

    mixed = series_of(tmp_path / "mixed")
    save(mixed / "b", [make_slice(s, k, uid_root="1.2.4") for k, s in enumerate(hu_at())])
    gap = series_of(tmp_path / "gap")
    (gap / "IM1.dcm").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no DICOM")
    other = tmp_path / "other.pt"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, other)
    stranger = tmp_path / "stranger.pt"
    stranger.write_bytes(pickle.dumps(print))
    small = tmp_path / "small.nii"
    nib.Nifti1Image(hu_at().transpose(2, 1, 0), np.eye(4)).to_filename(small)
    out = tmp_path / "out"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for words, sentence in [
        (
            (checkpoint, tmp_path / "gone.nii.gz", out.with_suffix(".nii")),
            "gone.nii.gz: expected a NIfTI file, got none",
        ),
        ((checkpoint, tmp_path / "gone", out), "gone: expected a NIfTI file or a folder of DICOM files, got none at"),
        (
            (checkpoint, empty, out),
            "empty: expected CT images with one slice per file, or enhanced",
        ),
        ((checkpoint, mixed, out), "mixed: expected one CT series, got 2 series; choose one with --series UID out of"),
        ((checkpoint, mixed, out, "--series", "7"), "mixed: expected one CT series, got no series 7; choose"),
        ((checkpoint, gap, out), "IM2.dcm: expected 2.5 mm to the slice before it (IM0.dcm), got 5"),
        ((checkpoint, axial / "IM1.dcm", out), "IM1.dcm: expected a NIfTI file or a folder, got one DICOM file; give"),
        ((other, axial, out), "other.pt: expected a denoiser's checkpoint"),
        ((stranger, axial, out), "stranger.pt: expected a denoiser's checkpoint, got another file, which is not"),
        ((checkpoint, source, out), "out: expected a name in .nii or .nii.gz, since a NIfTI file has no patient"),
        ((checkpoint, source, out, "--template", axial), "axial: expected a template of"),
        ((checkpoint, small, out, "--template", mixed / "b"), "b: expected a template on the grid of small.nii, got"),
        ((checkpoint, axial, out, "--template", axial), "template: expected for NIfTI in and DICOM out alone; leave"),
        ((checkpoint, source, out.with_suffix(".nii"), "--series", "7"), "volume-1.nii.gz: expected a folder of DICOM"),
        ((checkpoint, axial, axial / "new"), "new: expected a folder apart from the input"),
        ((checkpoint, axial, tmp_path / "used"), "used: expected a new or empty folder, got one that is not; add"),
        ((checkpoint, axial, tmp_path / "used", "--overwrite"), "used: expected nothing but a series to overwrite"),
        ((checkpoint, axial, out, "--device", "abacus"), "device: expected one that torch can use, got 'abacus'"),
        ((checkpoint, axial, out, "--task", checkpoint), "denoiser.pt: expected a task network's checkpoint"),
    ]:
        options = ["--checkpoint", "--input", "--output"]
        named = [w for pair in zip(options, words[:3], strict=True) for w in pair]
        assert run(*named, *words[3:]) == 2, sentence
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if "expected" in line]
        assert len(lines) == 1 and lines[0].startswith(sentence), said
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("command", ["denoise", "prepare"])
def test_a_note_is_one_line_whatever_the_command(tmp_path, checkpoint, command, capsys, monkeypatch):
    import warnings

    from examples.tod_net_ct.__main__ import main as program
    from tests.tod_net_ct.scans.test_dicom import series_of

    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    for dose in ("normal", "low"):
        (series_of(tmp_path / dose / "P1") / "README").write_text("a companion")
    words = [
        "--checkpoint",
        str(checkpoint),
        "--input",
        str(tmp_path / "low" / "P1"),
        "--output",
        str(tmp_path / "out.nii"),
    ]
    if command == "prepare":
        words = ["smoke", "--set", f"data={tmp_path}", "--set", "reuse=true", "--output", str(tmp_path / "run")]
        words += [word for name in ("train", "validation", "test") for word in ("--set", f"n_{name}=1")]
    assert program([command, *words]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said.count("note: P1: passed over 1 file without CT slices: README") >= 1
    assert not [line for line in said if "UserWarning" in line and "passed over" in line]
    with pytest.warns(UserWarning, match="another library's"):  # and whoever calls has its own display again
        warnings.warn("another library's", stacklevel=2)
