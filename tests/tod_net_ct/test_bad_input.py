"""Bad input of every kind: one sentence that names the file and the mend, exit code 2, nothing half-written."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.networks import Denoiser, save_checkpoint
from examples.tod_net_ct.run import PRESETS, load_tensors, save_tensors
from examples.tod_net_ct.scans import Cases, prepare

nib = pytest.importorskip("nibabel")

SHAPE = (32, 32, 8)  # columns, rows, slices
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
TINY = [f"--set={item}" for item in ("n_train=1", "n_validation=1", "n_test=1", "shape=4,16,16", "voxel_mm=3,4,4")]


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


def body(seed: int = 0) -> np.ndarray:
    """HU from -1024 to 1500."""
    return np.random.default_rng(seed).integers(-1024, 1500, SHAPE).astype(np.int16)


def liver() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[8:24, 8:24, 2:6] = 1
    return mask


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, affine).to_filename(path)


@pytest.fixture
def lits(tmp_path) -> Path:
    folder = tmp_path / "lits"
    for i in range(3):
        save(folder / f"volume-{i}.nii.gz", body(i))
        save(folder / f"segmentation-{i}.nii.gz", liver())
    return folder


def refused(arguments: list[str], capsys) -> str:
    """The one sentence on stderr of a command that must fail."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    sentence = said.err.strip()
    assert sentence and "\n" not in sentence and "Traceback" not in said.out + said.err
    return sentence


def prepare_command(data: Path, run: Path, *options: str) -> list[str]:
    return ["prepare", "smoke", "--output", str(run), f"--set=data={data}", *TINY, *options]


def assert_nothing_half_written(run: Path) -> None:
    assert not [path for path in run.rglob("*") if "unfinished" in path.name]
    assert not (run / "cases" / "manifest.json").exists(), "the stage would count as done"
    for path in run.rglob("*.pt"):
        assert set(load_tensors(path)) == {"normal_hu", "mask", "voxel_mm", "affine"}, "what is there is whole"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def singular(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:328] = np.asarray((AFFINE * [[1, 0, 1, 1]])[:3], "<f4").tobytes()  # nibabel would not write it
    path.write_bytes(gzip.compress(bytes(content)))


def with_nan(path: Path) -> None:
    voxels = body().astype(np.float32)
    voxels[3, 3, 3] = np.nan
    save(path, voxels)


SPOILT = {
    # what is done to which file -> words of the sentence
    "truncated NIfTI": ("volume-1.nii.gz", truncate, "expected a whole NIfTI file, got a truncated or damaged one"),
    "corrupt gzip": ("volume-1.nii.gz", flip_a_bit, "expected a whole NIfTI file, got a truncated or damaged one"),
    "truncated mask": ("segmentation-1.nii.gz", truncate, "got a truncated or damaged one"),
    "another format": (
        "volume-1.nii.gz",
        lambda path: path.write_text("liver " * 200),
        "expected a NIfTI file, got another format; convert it",
    ),
    "an empty file": ("volume-1.nii.gz", lambda path: path.write_bytes(b""), "expected a NIfTI file"),
    "different shapes": (
        "segmentation-1.nii.gz",
        lambda path: save(path, liver()[..., :7]),
        "volume-1.nii.gz: labels are 32x32x7 but the scan is 32x32x8; check the pair",
    ),
    "a mask elsewhere": (
        "segmentation-1.nii.gz",
        lambda path: save(path, liver(), AFFINE + [[0, 0, 0, 50.0], [0] * 4, [0] * 4, [0] * 4]),
        "got a grid that lies up to 50.0 mm away; check the pair",
    ),
    "missing scan": ("volume-1.nii.gz", Path.unlink, "volume-1.nii.gz: expected the partner of segmentation-1.nii.gz"),
    "missing mask": (
        "segmentation-1.nii.gz",
        Path.unlink,
        "segmentation-1.nii.gz: expected the partner of volume-1.nii.gz, got no such file; add it",
    ),
    "empty mask": (
        "segmentation-1.nii.gz",
        lambda path: save(path, 0 * liver()),
        "expected a labelled voxel, got an empty mask; leave this case out",
    ),
    "mask without the organ": (
        "segmentation-1.nii.gz",
        lambda path: save(path, 5 * liver()),
        "expected the organ 'liver' (labels 1, 2), got labels 0, 5; take the case out",
    ),
    "a mask that is an image": (
        "segmentation-1.nii.gz",
        lambda path: save(path, body()),
        "expected whole class numbers in 0..255",
    ),
    "units of 0..1": (
        "volume-1.nii.gz",
        lambda path: save(path, ((body() + 1024) / 2600).astype(np.float32)),
        "a scaled image; convert it back to HU",
    ),
    "units of 0..4095": (
        "volume-1.nii.gz",
        lambda path: save(path, (body() + 1024).clip(0, 4095)),
        "which look like unsigned CT numbers; subtract 1024",
    ),
    "singular affine": ("volume-1.nii.gz", singular, "expected an affine with three independent axes"),
    "NaN voxels": ("volume-1.nii.gz", with_nan, "expected a finite HU in every voxel, got 1 NaN or infinite"),
    "4-D": (
        "volume-1.nii.gz",
        lambda path: save(path, np.stack([body(), body()], -1)),
        "expected three axes of voxels, got 32x32x8x2; split a series into single volumes",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_case_that_cannot_be_used(fault, lits, tmp_path, capsys) -> None:
    name, spoil, words = SPOILT[fault]
    spoil(lits / name)
    sentence = refused(prepare_command(lits, tmp_path / "run"), capsys)
    assert words in sentence and "-1.nii.gz" in sentence, sentence
    assert_nothing_half_written(tmp_path / "run")


def test_a_run_takes_for_hu_what_it_is_told_to(lits, tmp_path, capsys) -> None:
    save(lits / "volume-1.nii.gz", (body() + 1024).clip(0, 4095))
    assert "(--set assume_hu=true in a run)" in refused(prepare_command(lits, tmp_path / "run"), capsys)
    assert main(prepare_command(lits, tmp_path / "run", "--set=assume_hu=true")) == 0
    least = [int(load_tensors(path)["normal_hu"].min()) for path in (tmp_path / "run" / "cases").glob("*.pt")]
    assert sorted(least)[-1] >= 0 > sorted(least)[-2], "the one scan without negative values came as it was"


def test_after_the_mend_the_same_command_goes_on(lits, tmp_path, capsys) -> None:
    good = (lits / "volume-1.nii.gz").read_bytes()
    truncate(lits / "volume-1.nii.gz")
    refused(prepare_command(lits, tmp_path / "run"), capsys)
    (lits / "volume-1.nii.gz").write_bytes(good)
    assert main(prepare_command(lits, tmp_path / "run")) == 0
    assert len(list((tmp_path / "run" / "cases").glob("*.pt"))) == 3


def test_the_case_is_named_where_all_files_are_called_alike(tmp_path, capsys) -> None:
    for i in range(3):
        save(tmp_path / f"kits/case_0000{i}/imaging.nii.gz", body(i))
        save(tmp_path / f"kits/case_0000{i}/segmentation.nii.gz", liver())
    with_nan(tmp_path / "kits/case_00002/imaging.nii.gz")
    command = prepare_command(tmp_path / "kits", tmp_path / "run", "--set=organ=kidney")
    assert refused(command, capsys).startswith("case_00002: imaging.nii.gz: expected a finite HU")
    sentence = refused(prepare_command(tmp_path / "kits", tmp_path / "run"), capsys)
    assert "this data set labels kidney (1, 2, 3); tumour (2), got the organ 'liver'; --set organ=kidney" in sentence


def test_a_low_dose_of_another_shape(tmp_path, capsys) -> None:
    for patient in ("L1", "L2", "L3"):
        save(tmp_path / f"pairs/{patient}_full.nii.gz", body())
        save(tmp_path / f"pairs/{patient}_quarter.nii.gz", body()[..., : 7 if patient == "L2" else 8])
    sentence = refused(prepare_command(tmp_path / "pairs", tmp_path / "run"), capsys)
    assert sentence.startswith("L2: ") or "L2_full" in sentence
    assert "the low dose is 7x32x32 but the scan is 8x32x32 (slices, rows, columns); check the pair" in sentence


def test_too_few_patients_says_how_to_go_on(lits, tmp_path, capsys) -> None:
    for name in ("volume-2.nii.gz", "segmentation-2.nii.gz"):
        (lits / name).unlink()
    sentence = refused(prepare_command(lits, tmp_path / "run"), capsys)
    assert "holds 2 patients but the splits need 3" in sentence and "--set reuse=true" in sentence
    assert main(prepare_command(lits, tmp_path / "run", "--set=reuse=true")) == 0


OPTIONS = {
    "a typo": ("orgam=liver", "--set orgam: there is no such setting; did you mean 'organ'?"),
    "a missing folder": ("data=nowhere", "nowhere: expected a folder of cases, got no such folder"),
    "an organ no phantom has": ("organ=brain", "organ must be one of background, liver, tumour, kidney"),
    "no phantoms": ("n_train=0", "n_train: expected at least 1 phantom, got 0"),
    "an endless overlap": ("overlap=1", "overlap: expected a number from 0 to 0.95, got 1.0"),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_a_setting_that_cannot_be(fault, tmp_path, capsys) -> None:
    option, words = OPTIONS[fault]
    arguments = ["prepare", "smoke", "--output", str(tmp_path / "run"), *TINY, f"--set={option}"]
    assert words in refused(arguments, capsys)
    assert_nothing_half_written(tmp_path / "run")


def test_a_full_disk_as_the_system_reports_it(lits, tmp_path, capsys) -> None:
    resource = pytest.importorskip("resource", reason="a limit on the size of files stands in for a full disk")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        sentence = refused(prepare_command(lits, tmp_path / "run"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "train-000.pt: expected room on the disk, got a full one; free some space and start again" in sentence
    assert_nothing_half_written(tmp_path / "run")
    assert not list((tmp_path / "run" / "cases").glob("*.pt"))
    assert main(prepare_command(lits, tmp_path / "run")) == 0, "with room again, the same command goes on"


def no_room(*_arguments, **_options):
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_later_keeps_what_is_done(lits, tmp_path, capsys, monkeypatch) -> None:
    writes = []

    def full_at_the_third(tensors, file, save=torch.save):
        writes.append(file)
        no_room() if len(writes) == 3 else save(tensors, file)

    monkeypatch.setattr(torch, "save", full_at_the_third)
    assert "got a full one" in refused(prepare_command(lits, tmp_path / "run"), capsys)
    assert_nothing_half_written(tmp_path / "run")
    assert len(list((tmp_path / "run" / "cases").glob("*.pt"))) == 2


@pytest.fixture
def scan_and_checkpoint(tmp_path) -> list[str]:
    save(tmp_path / "in.nii.gz", body())
    save_checkpoint(tmp_path / "best.pt", Denoiser(2), denoiser="tod_net")
    return ["denoise", "--input", str(tmp_path / "in.nii.gz"), "--output", str(tmp_path / "out.nii.gz")]


def test_a_full_disk_leaves_no_half_denoised_scan(scan_and_checkpoint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(nib.Nifti1Image, "to_filename", no_room)
    arguments = [*scan_and_checkpoint, "--checkpoint", str(tmp_path / "best.pt")]
    assert main(arguments) == 2
    assert "out.nii.gz: expected room on the disk, got a full one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "in.nii.gz"]


class Stranger:
    """A pickle that would act when it is read."""

    def __reduce__(self):
        return (os.mkdir, ("taken-over",))


CHECKPOINTS = {
    "a stranger's pickle": (
        lambda path: path.write_bytes(pickle.dumps(Stranger())),
        "bad.pt: expected a denoiser's checkpoint, got another file, which is not unpickled for safety",
    ),
    "a stranger's pickle in torch's clothes": (
        lambda path: torch.save(Stranger(), path),
        "bad.pt: expected a denoiser's checkpoint, got another file, which is not unpickled for safety",
    ),
    "weights of another network": (
        lambda path: save_tensors(path, weight=torch.zeros(3)),
        "bad.pt: expected a denoiser's checkpoint",
    ),
    "a truncated checkpoint": (
        lambda path: path.write_bytes(path.with_name("best.pt").read_bytes()[:3000]),
        "bad.pt: expected a denoiser's checkpoint, got a truncated or damaged file",
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_checkpoint_that_is_none(fault, scan_and_checkpoint, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write, words = CHECKPOINTS[fault]
    write(tmp_path / "bad.pt")
    assert words in refused([*scan_and_checkpoint, "--checkpoint", str(tmp_path / "bad.pt")], capsys)
    assert not (tmp_path / "taken-over").exists() and not (tmp_path / "out.nii.gz").exists()


STORED = {
    "a stranger's pickle": lambda path: path.write_bytes(pickle.dumps(Stranger())),
    "a stranger's pickle in torch's clothes": lambda path: torch.save(Stranger(), path),
    "a truncated file": truncate,
    "no file": Path.unlink,
}


@pytest.mark.parametrize("fault", STORED)
def test_a_prepared_case_that_was_tampered_with(fault, lits, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = PRESETS["smoke"].with_overrides(dict(item[6:].split("=", 1) for item in TINY) | {"data": str(lits)})
    prepare(settings, tmp_path / "run")
    cases = Cases(tmp_path / "run", "test")
    STORED[fault](cases.paths[0])
    with pytest.raises(ValueError, match=r"test-000.pt: expected tensors that this run wrote, got .*; remove the fold"):
        load_tensors(cases.paths[0])
    with pytest.raises(ValueError, match="test-000.pt: expected tensors"):
        cases.in_hu(0)
    assert not (tmp_path / "taken-over").exists()


def test_a_run_that_was_not_prepared(tmp_path) -> None:
    with pytest.raises(ValueError, match="manifest.json: expected the finished stage 'cases', got none; run it first"):
        Cases(tmp_path, "train")
