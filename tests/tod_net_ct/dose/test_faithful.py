"""The scanner simulation beside the fast one: its geometry, its noise, its manners; skipped without gecatsim."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.tod_net_ct.dose import ParallelBeam, degrade, simulate_volume
from examples.tod_net_ct.dose import faithful as route
from examples.tod_net_ct.dose.faithful import catsim_low_dose, check_catsim, parallel
from examples.tod_net_ct.dose.simulate import low_dose
from examples.tod_net_ct.run import Settings, load_tensors, save_tensors, write_text

pytest.importorskip("scipy")
catsim = pytest.mark.skipif(importlib.util.find_spec("gecatsim") is None, reason="gecatsim is not installed")

N, VIEWS, PIXEL_MM = 40, 120, 8.0
VOXEL_MM = (5.0, PIXEL_MM, PIXEL_MM)
BEAM = ParallelBeam(N, VIEWS, PIXEL_MM)
SETTINGS = Settings(route="catsim", n_views=VIEWS, i0_photons=5e4, kernel="hann")


def blobs() -> Tensor:
    """Smooth, and alike under no reflection or rotation."""
    at = (torch.arange(N) - (N - 1) / 2) * PIXEL_MM
    wide = torch.exp(-((at[:, None] - 20).square() + (at - 30).square()) / (2 * 40**2))
    small = torch.exp(-((at[:, None] + 40).square() + (at - 70).square()) / (2 * 20**2))
    return 0.6 * wide + 0.4 * small


def body() -> Tensor:
    at = (torch.arange(N) - (N - 1) / 2) * PIXEL_MM
    radius = ((at[:, None] / 110).square() + (at / 130).square()).sqrt()
    return -1000 + 1040 * torch.sigmoid((1 - radius) * 20)


def test_a_fan_is_rebinned_to_parallel_rays() -> None:
    x, y, sigma = 30.0, -50.0, 22.0
    columns = 60
    angle = (np.arange(columns) - (columns - 1) / 2 + route.COLUMN_OFFSET) * route._column_angle(BEAM)
    theta = np.arange(VIEWS)[:, None] * math.tau / VIEWS + angle
    distance = route.SOURCE_TO_CENTRE_MM * np.sin(angle) - x * np.cos(theta) - y * np.sin(theta)
    made = parallel(np.exp(-((distance / sigma) ** 2) / 2), BEAM)
    angles = torch.arange(VIEWS)[:, None] * (math.pi / VIEWS)
    shadow = BEAM.bin_mm - x * torch.cos(angles) - y * torch.sin(angles)
    torch.testing.assert_close(made, torch.exp(-(shadow / sigma).square() / 2), rtol=0, atol=5e-3)


@catsim
def test_the_scanner_sees_what_the_projector_sees() -> None:
    clean, _ = (parallel(s, BEAM) for s in route.fan_scan(blobs(), VOXEL_MM, SETTINGS, (0, 0), BEAM))
    reference = BEAM.project(blobs()[None])[0]
    mu_water = (clean * reference).sum() / reference.square().sum()
    assert 0.018 < mu_water < 0.023
    assert (clean - mu_water * reference).norm() < 0.02 * (mu_water * reference).norm()


@catsim
@pytest.mark.parametrize("i0_photons", [2e5, 1e4])
def test_both_routes_make_the_same_noise_at_the_same_flux(i0_photons) -> None:
    volume, inside = body().expand(6, N, N), (slice(None), slice(15, 25), slice(15, 25))
    ours, std = catsim_low_dose(volume, VOXEL_MM, replace(SETTINGS, i0_photons=i0_photons), seed=0)
    fast = low_dose(volume.clone(), VOXEL_MM, i0_photons, generator=0, kernel="hann", beam=BEAM).volume_hu
    ratio = float((ours - volume)[inside].std() / (fast - volume)[inside].std())
    assert 0.8 < ratio < 1.4
    torch.testing.assert_close(std, (ours - volume).std(dim=(1, 2)))
    assert abs(float((ours - volume)[inside].mean())) < 0.3 * float((ours - volume)[inside].std())


@catsim
def test_electronic_noise_and_the_bowtie_add_noise() -> None:
    volume, edge = body().expand(4, N, N), (slice(None), slice(15, 25), slice(5, 9))
    few = replace(SETTINGS, i0_photons=5e3)
    std = {
        name: float((catsim_low_dose(volume, VOXEL_MM, replace(few, **change), seed=0)[0] - volume)[edge].std())
        for name, change in {
            "quantum": {"electronic_noise_photons": 0.0},
            "electronic": {"electronic_noise_photons": 60.0},
            "bowtie": {"electronic_noise_photons": 0.0, "bowtie": True},
        }.items()
    }
    assert std["electronic"] > 1.3 * std["quantum"]
    assert std["bowtie"] > 1.1 * std["quantum"]


@catsim
def test_a_seed_fixes_the_noise_and_nothing_else_is_touched(capfd) -> None:
    volume, state = body()[None], np.random.get_state()[1].copy()
    made = [simulate_volume(volume.short(), VOXEL_MM, SETTINGS, seed)["low_hu"] for seed in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert np.array_equal(np.random.get_state()[1], state)
    assert capfd.readouterr() == ("", "")


@catsim
def test_slices_differ_in_noise_and_air_stays_without_nan() -> None:
    volume = torch.stack([body(), body(), torch.full((N, N), -1000.0)])
    low, _ = catsim_low_dose(volume, VOXEL_MM, SETTINGS, seed=0)
    noise = low - volume
    assert noise.isfinite().all()
    assert abs(float(torch.corrcoef(noise[:2].flatten(1))[0, 1])) < 0.2


@catsim
def test_the_stage_takes_this_route(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")
    volume = body()[None].round().short()
    save_tensors(tmp_path / "cases" / "test-000.pt", normal_hu=volume, mask=volume, voxel_mm=torch.tensor(VOXEL_MM))
    write_text(tmp_path / "cases" / "manifest.json", json.dumps({"facts": {}, "results": {}}))
    degrade(SETTINGS, tmp_path)
    made = load_tensors(tmp_path / "low_dose" / "test-000.pt")
    assert 5 < float(made["noise_std_hu"].mean()) < 60
    assert made["low_hu"].dtype == torch.int16


@catsim
def test_a_slice_wider_than_the_gantry_is_refused() -> None:
    with pytest.raises(ValueError, match="route: a slice's diagonal of .* mm does not fit catsim's gantry; use fast"):
        catsim_low_dose(body()[None], (5.0, 30.0, 30.0), SETTINGS, seed=0)


def test_without_gecatsim_one_sentence_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^route: catsim needs gecatsim; install it as docs/simulation.md says, or use"
    ):
        check_catsim(SETTINGS)


def test_a_dose_fraction_is_for_the_fast_route(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="^dose_fraction: the route catsim takes scans for noiseless; use"):
        check_catsim(replace(SETTINGS, dose_fraction=0.5))
