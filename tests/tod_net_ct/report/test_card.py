"""A denoiser handed on: the same network from a folder or a hub, a card that says what it has seen, refusals."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.networks import Denoiser, load_weights, save_checkpoint, weights_of
from examples.tod_net_ct.report import export
from examples.tod_net_ct.run import PRESETS, write_text

pytest.importorskip("safetensors")


def number(mean: float) -> dict[str, float]:
    return {"mean": mean, "sd": 1.0, "n": 3}


@pytest.fixture
def run(tmp_path):
    """A run as far as an export looks at it."""
    folder = tmp_path / "run"
    torch.manual_seed(3)
    path = folder / "denoisers" / "tod_net" / "best.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(
        path, Denoiser(1), window_hu=(-150, 250), seed=3, step=7, voxel_mm=[6.0, 3.0, 3.0], denoiser="tod_net"
    )
    write_text(folder / "settings.yaml", PRESETS["smoke"].with_overrides({"voxel_mm": "6,3,3"}).to_yaml())
    means = {"none": {"roi_rmse_hu": number(80.0), "unet_dice": number(61.0)},
             "tod_net": {"roi_rmse_hu": number(31.25), "unet_dice": number(93.5)}}  # fmt: skip
    summary = {"n_cases": 3, "means": {"low": means}, "comparisons": [], "focus": {}}
    write_text(folder / "evaluation" / "summary.json", json.dumps(summary))
    return folder


def scan(path):
    volume = np.random.default_rng(0).normal(0, 60, (9, 8, 7)).astype("int16")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    return path


def test_the_network_comes_back_as_it_was_with_what_is_known_of_it(run, tmp_path) -> None:
    folder = export(run, "tod_net", tmp_path / "out", licence="CC-BY-4.0")
    network = load_weights(weights_of(folder))
    before = load_weights(weights_of(run / "denoisers" / "tod_net" / "best.pt"))
    image = torch.rand(1, 1, 4, 6, 6)
    assert torch.equal(network(image), before(image)) and not network.training
    assert network.config == before.config and network.facts["window_hu"] == (-150.0, 250.0)
    assert network.facts["voxel_mm"] == [6.0, 3.0, 3.0] and network.facts["licence"] == "CC-BY-4.0"


def test_the_card_says_what_it_has_seen_and_what_came_out(run, tmp_path) -> None:
    card = (export(run, "tod_net", tmp_path / "out", licence="CC-BY-4.0") / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for part in (
        "phantoms",
        "-150 to 250",
        "6 x 3 x 3 mm",
        "photons a ray",
        "width 1",
        "CC-BY-4.0",
        "No medical device",
    ):
        assert part in card, part
    assert "| roi_rmse_hu | 80 | 31.25 |" in card and "| unet_dice | 61 | 93.5 |" in card


def test_denoise_reads_the_folder_the_file_and_a_hubs_repository(run, tmp_path, monkeypatch) -> None:
    source = scan(tmp_path / "scan.nii.gz")
    folder = export(run, "tod_net", tmp_path / "out", licence="CC0-1.0")
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    outputs = []
    given = [run / "denoisers" / "tod_net" / "best.pt", folder, folder / "denoiser.safetensors", "someone/denoiser@v1"]
    for number_, checkpoint in enumerate(given):
        output = tmp_path / f"{number_}.nii.gz"
        assert main(["denoise", "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]) == 0
        outputs.append(np.asanyarray(nib.load(output).dataobj))
    assert asked == [("someone/denoiser", "v1", ["denoiser.safetensors", "README.md"])]
    assert all(np.array_equal(outputs[0], other) for other in outputs[1:])
    assert not np.array_equal(outputs[0], np.asanyarray(nib.load(source).dataobj))


def test_no_answer_from_a_hub_is_one_sentence(monkeypatch) -> None:
    def snapshot_download(name, **_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(
        ValueError, match=r"someone/denoiser: expected a file, a folder or a repository id, .*ConnectionError"
    ):
        weights_of("someone/denoiser")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface-hub"):
        weights_of("someone/denoiser")


def damaged(folder):
    path = folder / "denoiser.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def strange(folder):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, folder / "denoiser.safetensors")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (damaged, "denoiser.safetensors: expected an exported denoiser, got a damaged file"),
        (strange, r"denoiser.safetensors: expected an exported denoiser \(.*\), got other weights"),
        (lambda folder: (folder / "denoiser.safetensors").unlink(), "out: expected a folder from `export`"),
    ],
)
def test_a_spoilt_export_is_one_sentence(run, tmp_path, spoil, sentence) -> None:
    folder = export(run, "tod_net", tmp_path / "out", licence="CC0-1.0")
    spoil(folder)
    with pytest.raises(ValueError, match=sentence):
        load_weights(weights_of(folder))


def test_what_cannot_be_exported_is_refused(run, tmp_path, capsys) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = ["export", "--run", str(run), "--licence", "CC0-1.0", "--output"]
    assert main([*words, str(tmp_path / "full")]) == 2
    assert "full: expected a new or empty folder, got one that holds files" in capsys.readouterr().err
    (run / "settings.yaml").write_text("data: /scans/of/a/hospital\n")
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "expected --data to say what the denoiser was trained on" in capsys.readouterr().err
    (run / "evaluation" / "summary.json").unlink()
    assert main([*words, str(tmp_path / "out"), "--data", "scans of a hospital"]) == 2
    assert "run `evaluate` first" in capsys.readouterr().err and not (tmp_path / "out").exists()
