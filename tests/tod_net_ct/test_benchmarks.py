"""The benchmarks of the CT example run at small sizes, and compare things that are equal."""

import math

import pytest
import torch

from benchmarks import busy, data, denoising, simulation
from benchmarks.harness import Case, Options

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def options(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return Options(device=torch.device(device), quick=True)


def check(case: Case) -> None:
    """Each target has its numbers, and both sides agree."""
    for target in case.targets:
        assert all(math.isfinite(number) for number in case.ratio(target)), target
    assert all(found <= tolerance for found, tolerance in case.agreement.values())
    assert all(samples and min(samples) > 0 for samples in case.seconds.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MONAI's own
@pytest.mark.parametrize("device", DEVICES)
def test_denoising(device):
    (case,) = denoising.run(options(device))
    check(case)
    assert case.agreement["ours and untiled"][0] <= 1e-4
    assert {"ours", "MONAI"} == set(case.seconds)


@pytest.mark.slow
def test_a_clinical_scan_at_the_papers_width_fits_8_gb():
    case = denoising.one_tile(denoising.CLINICAL, denoising.PAPER_WIDTH, options("cpu"))
    assert 2 < case.values["peak of the whole process in GB"] < denoising.MEMORY_GB
    assert case.values["tiles"] > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("device", DEVICES)
def test_simulation(device):
    cases = simulation.run(options(device))
    for case in cases:
        check(case)
    errors = [value for name, value in cases[0].values.items() if name.endswith("of ours")]
    assert len(errors) == 2 and max(errors) < 1e-3
    assert len(cases[0].seconds) + len(cases[0].gaps) == 4
    assert len(cases[1].seconds) + len(cases[1].gaps) == 2


@pytest.mark.slow
def test_the_demo_beside_a_busy_process():
    (case,) = busy.run(options("cpu"))
    check(case)
    assert set(case.seconds) == {busy.QUIET, busy.BUSY}


def test_a_missing_peer_is_a_gap(monkeypatch):
    def gone(*_):
        raise ImportError

    for name in ("_astra", "_skimage", "_deepinv"):
        monkeypatch.setattr(simulation, name, gone)
    case = simulation._slice(16, 24, Options(quick=True))
    assert [gap.split(":")[0] for gap in case.gaps] == ["astra-toolbox", "scikit-image", "deepinv"]
    assert case.targets == []


def test_a_wrong_sinogram_is_refused():
    case = Case("projection")
    with pytest.raises(AssertionError, match="projection, sinogram: expected an error up to 0.01, got 0.5"):
        simulation._accept(case, "sinogram", 0.5, 0.01)


def test_the_closed_form_is_the_projection_of_the_blobs():
    sinogram = simulation.exact_sinogram(torch.zeros(1, dtype=torch.float64), 64, 64)[0]
    torch.testing.assert_close(sinogram, simulation.phantom(64).double().sum(0), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MONAI's own
def test_data():
    first, cached = data.run(Options(quick=True))
    for case in (first, cached):
        check(case)
        assert {"ours", "MONAI PersistentDataset", "MONAI CacheDataset"} == set(case.seconds)
    assert first.values["MB in memory per volume, ours"] < 20
