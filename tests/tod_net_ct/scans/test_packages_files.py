"""Every test file that pydicom and nibabel ship, through `denoise` and `prepare`: a right result or one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")

from examples.tod_net_ct.__main__ import main  # noqa: E402
from examples.tod_net_ct.networks import Denoiser, save_checkpoint  # noqa: E402
from examples.tod_net_ct.run import load_tensors  # noqa: E402
from examples.tod_net_ct.scans import read_scan  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SOURCES = {
    "pydicom": (Path(pydicom.__file__).parent / "data", "**/*"),
    "nibabel": (Path(nib.__file__).parent, "**/tests/data/**/*"),
}
MOST_BYTES = 4_000_000  # none of today's is larger
TINY = ("n_train=1", "n_validation=1", "n_test=1", "reuse=true", "assume_hu=true", "shape=4,16,16")


def shipped(package: str) -> list[Path]:
    root, pattern = SOURCES[package]
    files = [path for path in sorted(root.glob(pattern)) if path.is_file() and path.suffix not in (".py", ".pyc")]
    return [path for path in files if path.stat().st_size <= MOST_BYTES]


def told_by(capsys) -> list[str]:
    """The lines on stderr but for notes and the bar."""
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line and not line.startswith("note: ") and "━" not in line]


def expected_hu(path: Path) -> np.ndarray | None:
    """What the package itself reads, in any order; None where it is no single image."""
    if path.name.endswith((".nii", ".nii.gz")):
        return np.sort(np.asarray(nib.load(path).dataobj, np.float32), axis=None)
    dataset = pydicom.dcmread(path, force=True)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        return None
    return np.sort(pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset).astype(np.float32), axis=None)


def fault_of(source: Path, path: Path, tmp: Path, checkpoint: Path, capsys) -> str | None:
    """What is wrong with how `denoise` and `prepare` took a source that holds this file; None if nothing is."""
    output = tmp / "out.nii"
    output.unlink(missing_ok=True)
    words = ["denoise", "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(output)]
    try:
        code = main([*words, "--assume-hu", "--tile", "8", "64", "64", "--statistics", "tile", "--device", "cpu"])
    except BaseException as error:
        return f"denoise: {type(error).__name__}: {error}"
    told = told_by(capsys)
    if code == 2:
        whole = len(told) == 1 and "expected" in told[0] and not output.exists()
        return None if whole else f"denoise: {told}, {output.exists()}"
    before, after = read_scan(source, assume_hu=True).volume_hu, read_scan(output, assume_hu=True).volume_hu
    hu = expected_hu(path)
    if hu is not None and not np.array_equal(np.sort(before.numpy(), axis=None), hu):
        return "denoise: other HU than the package's own"
    far = before.abs() > 400
    if before.shape != after.shape or not torch.allclose(before[far], after[far], rtol=1e-6):
        return "denoise: voxels far outside the window changed"
    return fault_of_prepare(source, tmp, before, capsys)


def fault_of_prepare(source: Path, tmp: Path, volume_hu: torch.Tensor, capsys) -> str | None:
    data = tmp / "data"
    name = "P1" + ("".join(source.suffixes[-2:]) if source.is_file() else "")
    for dose in ("normal", "low"):
        (data / dose).mkdir(parents=True, exist_ok=True)
        for old in (data / dose).iterdir():
            old.unlink()
        (data / dose / name).symlink_to(source, target_is_directory=source.is_dir())
    settings = [word for item in (f"data={data}", *TINY) for word in ("--set", item)]
    try:
        code = main(["prepare", "smoke", "--output", str(tmp / "run"), *settings])
    except BaseException as error:
        return f"prepare: {type(error).__name__}: {error}"
    told = told_by(capsys)
    if code == 2:
        return None if len(told) == 1 and "expected" in told[0] else f"prepare: {told}"
    kept = load_tensors(tmp / "run" / "cases" / "test-000.pt")["normal_hu"]
    return None if torch.equal(kept, volume_hu.round().to(torch.int16)) else "prepare: other HU than denoise's"


@pytest.mark.parametrize("package", SOURCES)
def test_each_file_ends_in_a_right_result_or_one_sentence(package, tmp_path, capsys, monkeypatch) -> None:
    files = shipped(package)
    if not files:
        pytest.skip(f"{package} came without its test files")
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    torch.manual_seed(0)
    checkpoint = save_checkpoint(tmp_path / "d.pt", Denoiser(1))
    faults, read = {}, 0
    for number, path in enumerate(files):
        folder = tmp_path / f"in-{number}"
        folder.mkdir()
        (folder / path.name).symlink_to(path)
        for source in (path, folder):
            fault = fault_of(source, path, tmp_path, checkpoint, capsys)
            read += fault is None and (tmp_path / "out.nii").exists()
            if fault:
                faults[f"{path.name}{'' if source == path else ' in a folder'}"] = fault
    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
    assert read >= 2, "some of them are scans"


def test_all_of_them_in_one_folder_are_one_sentence(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    checkpoint = save_checkpoint(tmp_path / "d.pt", Denoiser(1))
    for package, (root, _) in SOURCES.items():
        words = ["--checkpoint", str(checkpoint), "--input", str(root), "--output", str(tmp_path / "out.nii")]
        assert main(["denoise", *words]) == 2, package
        told = told_by(capsys)
        assert len(told) == 1 and "expected" in told[0], told
