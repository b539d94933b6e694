"""NIfTI files as strangers have them: headers that promise too much or say nothing, and values that are not HU."""

from __future__ import annotations

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
import torch

nib = pytest.importorskip("nibabel")

from examples.tod_net_ct.scans import read_scan  # noqa: E402
from examples.tod_net_ct.scans.hounsfield import check_hu  # noqa: E402

from .test_nifti import save, voxels_hu  # noqa: E402


def altered(tmp_path, offset, form, *values, name="odd.nii"):
    """A good file with one field of its header overwritten."""
    content = bytearray(save(tmp_path / "good.nii", voxels_hu()).read_bytes())
    struct.pack_into(f"<{form}", content, offset, *values)
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(content)) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize(
    ("offset", "form", "values", "words"),
    [
        (70, "h", (4242,), "a known data type, got datatype code 4242"),
        (40, "h", (9,), "1 to 7 axes of at least one voxel, got dim "),
        (42, "3h", (3, -4, 5), r"1 to 7 axes of at least one voxel, got dim \[3, 3, -4, 5"),
        (108, "f", (0.0,), "voxels from byte 352 on, got vox_offset 0"),
        (108, "f", (float("nan"),), "voxels from byte 352 on, got vox_offset nan"),
        (112, "2f", (1.0, float("nan")), "a finite scaling, got scl_slope 1 and scl_inter nan"),
        (112, "2f", (float("inf"), 0.0), "a finite scaling, got scl_slope inf and scl_inter 0"),
        (123, "B", (7,), "lengths in metres, mm or micrometres, got xyzt_units 7"),
        (108, "f", (1e6,), "its header promises 1,000,120 bytes and it has 472"),
    ],
)
def test_a_header_that_cannot_be_is_named(tmp_path, offset, form, values, words):
    with pytest.raises(ValueError, match=f"^odd.nii: expected .*{words}"):
        read_scan(altered(tmp_path, offset, form, *values))


@pytest.mark.parametrize("name", ["big.nii", "big.nii.gz"])
@pytest.mark.parametrize(("n", "words"), [(2000, "expected at most 2,147,483,648 voxels"), (1000, "it has")])
def test_what_a_header_promises_is_not_allocated(tmp_path, name, n, words):
    path = altered(tmp_path, 42, "3h", n, n, n, name=name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{name}: .*{words}"):
            read_scan(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    content = save(tmp_path / "good.nii", voxels_hu()).read_bytes()
    with gzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
        file.write(content)
        for _ in range(40):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^bomb.nii.gz: .*little or nothing behind the voxels, got more than"):
            read_scan(tmp_path / "bomb.nii.gz")
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


def test_a_few_bytes_behind_the_voxels_do_no_harm(tmp_path):
    content = save(tmp_path / "good.nii", voxels_hu()).read_bytes()
    (tmp_path / "padded.nii").write_bytes(content + bytes(100))
    assert torch.equal(read_scan(tmp_path / "padded.nii").volume_hu, read_scan(tmp_path / "good.nii").volume_hu)


def body_hu(shape=(10, 20, 20)):
    """Air, fat, soft tissue with noise, and a little bone: the histogram of a small CT."""
    generator = np.random.default_rng(0)
    hu = np.full(shape, -1000.0)
    hu[:, 3:-3, 3:-3] = -100
    hu[:, 5:-5, 5:-5] = 50
    hu[:, 9:11, 9:11] = 700
    return torch.from_numpy(hu + generator.normal(0, 20, shape)).round().float()


NOT_HU = {
    "label map": ((body_hu() > 0).float() + (body_hu() > 300).float(), "look like class numbers"),
    "one label": ((body_hu() > 0).float() * 3, "look like class numbers"),
    "grey levels": (((body_hu() + 160) * 254 / 400).clamp(0, 254).round(), "look like 8-bit grey levels"),
    "signed grey levels": (((body_hu() + 160) * 255 / 400).clamp(0, 255).round() - 128, "look like 8-bit grey"),
    "HU times 10": (body_hu() * 10, "spread too far, as if HU had been multiplied"),
    "z-scores": ((body_hu() - body_hu().mean()) / body_hu().std(), "look like a standardised image"),
    "unit": (((body_hu() + 1024) / 2000).clamp(0, 1), "a scaled image"),
    "offset 1000": ((body_hu() + 1100).clamp(0), "look like unsigned CT numbers"),
    "offset 1024 and padding": (
        torch.cat([(body_hu() + 1100).clamp(0), torch.full((2, 20, 20), -2000.0)]),
        "look like unsigned CT numbers",
    ),
    "MRI": ((body_hu() + 1024).clamp(0) / 2 - (torch.arange(4000).view(10, 20, 20) < 3) * 40.0, "as in an MRI"),
}


@pytest.mark.parametrize("case", NOT_HU)
def test_what_is_not_hu_is_refused(tmp_path, case):
    volume, words = NOT_HU[case]
    words = (
        f"^odd.nii: expected HU .air near -1000., got values from .*{words}.*, or say that they are HU with --assume-hu"
    )
    path = save(tmp_path / "odd.nii", volume.numpy().astype(np.float32))
    with pytest.raises(ValueError, match=words):
        read_scan(path)
    assert read_scan(path, assume_hu=True).volume_hu.numel() == volume.numel()


HU = {
    "body": body_hu(),
    "windowed": body_hu().clamp(-160, 240),
    "padded": torch.cat([body_hu(), torch.full((2, 20, 20), -2048.0)]),
    "metal": torch.cat([body_hu().flatten(), torch.full((20,), 20000.0)]),
    "noisy": body_hu() + torch.randn(10, 20, 20, generator=torch.Generator().manual_seed(0)) * 100,
    "no air": body_hu().clamp(-110, 1000),
    "one value": torch.full((4, 4, 4), 40.0),
}


@pytest.mark.parametrize("case", HU)
def test_hu_are_hu_in_any_window(tmp_path, case):
    check_hu(tmp_path / "scan.nii", HU[case])
