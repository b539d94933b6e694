"""Laws of the low-dose simulation: the dose formula carried through the reconstruction, determinism, honesty."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.tod_net_ct.dose import ParallelBeam
from examples.tod_net_ct.dose.simulate import MU_WATER_PER_MM, LowDose, attenuation_per_mm, bowtie_fluence, low_dose

N, VIEWS, PIXEL_MM = 24, 20, 10.0
VOXEL_MM = (5.0, PIXEL_MM, PIXEL_MM)
BEAM = ParallelBeam(N, VIEWS, PIXEL_MM)


def cylinder(radius_mm: float = 90.0, n_slices: int = 1, hu: float = 0.0) -> Tensor:
    """A soft-edged water cylinder in air."""
    at = (torch.arange(N) - (N - 1) / 2) * PIXEL_MM
    distance = (at[:, None].square() + at.square()).sqrt() - radius_mm
    return (-1000 + (1000 + hu) * torch.sigmoid(-distance / 4)).expand(n_slices, N, N).clone()


def simulate(volume: Tensor, i0_photons: float = 1e5, seed: int = 0, **options) -> LowDose:
    return low_dose(volume, VOXEL_MM, i0_photons, generator=seed, beam=BEAM, **options)


def predicted_std(volume: Tensor, row: int, column: int, i0: float, sigma: float) -> float:
    """Noise of one pixel: the ray's variance through the exact derivative of the reconstruction."""
    beam = ParallelBeam(N, VIEWS, PIXEL_MM, dtype=torch.float64)
    path = beam.project(attenuation_per_mm(volume[:1].double()))
    sinogram = torch.zeros_like(path).requires_grad_()
    beam.fbp(sinogram, "hann")[0, row, column].backward()
    variance = path.exp() / i0 + sigma**2 * (2 * path).exp() / i0**2
    return float((sinogram.grad.square() * variance).sum().sqrt() * 1000 / MU_WATER_PER_MM)


@pytest.mark.parametrize("sigma", [0.0, 60.0], ids=["quantum", "electronic"])
@pytest.mark.parametrize(("row", "column"), [(12, 12), (8, 15)], ids=["centre", "aside"])
def test_the_noise_of_a_pixel_follows_the_dose_formula(sigma, row, column):
    volume = cylinder(n_slices=600)
    noise = simulate(volume, 1e5, electronic_noise_photons=sigma).volume_hu - volume
    measured, expected = float(noise[:, row, column].std()), predicted_std(volume, row, column, 1e5, sigma)
    assert abs(measured / expected - 1) < 4 / math.sqrt(2 * 600)
    assert abs(float(noise[:, row, column].mean())) < 4 * expected / math.sqrt(600)


def test_noise_falls_with_the_root_of_the_dose():
    volume = cylinder(n_slices=40)
    std = [float(simulate(volume, i0, electronic_noise_photons=0.0).noise_std_hu.mean()) for i0 in (4e4, 16e4)]
    assert abs(std[0] / std[1] - 2) < 0.08


def test_noise_grows_with_what_the_rays_pass_through():
    thin, thick, dense = (simulate(v).noise_std_hu for v in (cylinder(60), cylinder(100), cylinder(100, hu=300)))
    assert thin < thick < dense


def test_softer_kernels_and_more_views_lower_the_noise():
    volume = cylinder(n_slices=4)
    assert simulate(volume, kernel="hann").noise_std_hu.mean() < simulate(volume, kernel="ramp").noise_std_hu.mean()
    more = low_dose(volume, VOXEL_MM, 1e5, generator=0, n_views=80).noise_std_hu.mean()
    assert abs(float(simulate(volume).noise_std_hu.mean() / more) - 2) < 0.2


def test_anatomy_keeps_the_resolution_of_the_normal_dose():
    volume = cylinder()
    assert (simulate(volume, 1e12, electronic_noise_photons=0.0).volume_hu - volume).abs().max() < 0.1
    soft = simulate(volume, 1e12, electronic_noise_photons=0.0, reconstruct=True).volume_hu
    assert (soft - volume).abs().max() > 50  # the Hann kernel blurs the edge


def test_reconstruction_in_full_adds_the_same_noise_to_a_reconstructed_image():
    volume = cylinder()
    clean = BEAM.fbp(BEAM.project(attenuation_per_mm(volume))) * 1000 / MU_WATER_PER_MM - 1000
    noise = simulate(volume).volume_hu - volume
    full = simulate(volume, reconstruct=True).volume_hu
    torch.testing.assert_close(full, clean + noise, rtol=0, atol=0.01)


def test_a_seed_fixes_the_noise_and_the_global_random_state_stays():
    volume, state = cylinder(n_slices=3), torch.get_rng_state()
    first = simulate(volume, seed=7).volume_hu
    torch.rand(3)
    generator = torch.Generator().manual_seed(7)
    torch.set_rng_state(state)
    assert torch.equal(simulate(volume, seed=generator).volume_hu, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(simulate(volume, seed=8).volume_hu, first)
    assert torch.equal(volume, cylinder(n_slices=3))


def test_slices_do_not_depend_on_how_many_are_simulated_together():
    volume = torch.cat([cylinder(r) for r in (60, 80, 100, 70)])
    together = simulate(volume).volume_hu
    assert torch.equal(simulate(volume[:2]).volume_hu, together[:2])
    generator = torch.Generator().manual_seed(0)
    pieces = [low_dose(v[None], VOXEL_MM, 1e5, generator=generator, beam=BEAM).volume_hu for v in volume]
    assert torch.equal(torch.cat(pieces), together)


def test_starved_rays_are_clamped_and_counted():
    bright = simulate(cylinder(90), 1e5)
    assert (bright.n_clamped, bright.n_rays) == (0, VIEWS * BEAM.n_bins)
    starved = simulate(cylinder(90), 30.0)
    assert starved.min_expected_photons < 2
    assert 0 < starved.n_clamped < starved.n_rays
    assert bool(starved.volume_hu.isfinite().all())
    assert (bright.n_views, bright.kernel) == (VIEWS, "hann")


def test_a_reading_without_a_photon_counts_as_one():
    dark = simulate(cylinder(90), 1e-6, electronic_noise_photons=0.0, reconstruct=True)
    assert dark.n_clamped == dark.n_rays
    sinogram = torch.full((1, VIEWS, BEAM.n_bins), math.log(1e-6))
    expected = BEAM.fbp(sinogram) * 1000 / MU_WATER_PER_MM - 1000
    torch.testing.assert_close(dark.volume_hu, expected, rtol=1e-3, atol=1.0)


def test_the_result_carries_no_gradient():
    assert not simulate(cylinder().requires_grad_()).volume_hu.requires_grad


def test_a_whole_dose_adds_nothing():
    volume = cylinder(n_slices=2)
    assert torch.equal(simulate(volume, dose_fraction=1.0).volume_hu, volume)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_dose_fraction_adds_only_what_the_scan_lacks(fraction):
    clean, i0, sigma = cylinder(n_slices=1500), 2e5, 200.0
    noisy = simulate(clean, i0, electronic_noise_photons=sigma).volume_hu
    reduced = simulate(noisy, i0, seed=1, electronic_noise_photons=sigma, dose_fraction=fraction).volume_hu
    measured = float((reduced - clean)[:, 12, 12].std())
    assert abs(measured / predicted_std(clean, 12, 12, fraction * i0, sigma) - 1) < 4 / math.sqrt(2 * 1500)


def test_hounsfield_units_become_attenuation_and_stop_at_air():
    mu = attenuation_per_mm(torch.tensor([-3024.0, -1000.0, 0.0, 1000.0]), 0.02)
    torch.testing.assert_close(mu, torch.tensor([0.0, 0.0, 0.02, 0.04]))
    volume = cylinder()
    padded = torch.where(volume < -990, -3024.0, volume)
    flat = torch.where(volume < -990, -1000.0, volume)
    noise = [simulate(v).volume_hu - v for v in (padded, flat)]
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)


def test_a_bowtie_evens_out_a_water_cylinder_and_costs_photons_outside():
    at = BEAM.bin_mm
    fluence = bowtie_fluence(at, radius_mm=90.0, strength=1.0)
    inside = at.abs() < 90
    chord = 2 * (90.0**2 - at[inside].square()).sqrt()
    arriving = fluence[inside] * torch.exp(-MU_WATER_PER_MM * chord)
    torch.testing.assert_close(arriving, arriving[:1].expand_as(arriving))
    torch.testing.assert_close(bowtie_fluence(at, 90.0, strength=0.0), torch.ones_like(at))
    volume = cylinder(n_slices=60)
    even, shaped = simulate(volume), simulate(volume, fluence=fluence)
    ring = (slice(None), 12, 3)  # at the cylinder's edge
    assert (shaped.volume_hu - volume)[ring].std() > 1.5 * (even.volume_hu - volume)[ring].std()


def test_double_precision_is_kept():
    volume = cylinder().double()
    result = low_dose(volume, VOXEL_MM, 1e5, generator=0, n_views=VIEWS)
    assert result.volume_hu.dtype == torch.float64


def test_a_real_scan_gets_plausible_noise():
    folder = os.environ.get("TASKLOSS_CT_DATA")
    if not folder or not (path := Path(folder) / "lits" / "volume-117.nii.gz").exists():
        pytest.skip("TASKLOSS_CT_DATA holds no lits/volume-117.nii.gz")
    nibabel = pytest.importorskip("nibabel")
    volume = torch.from_numpy(nibabel.load(path).get_fdata(dtype="float32")).permute(2, 1, 0)[60:62]
    result = low_dose(volume, (1.0, 1.0, 1.0), 1e4, generator=0, n_views=180)
    assert bool(((result.noise_std_hu > 15) & (result.noise_std_hu < 90)).all())


HOLED = torch.full((1, N, N), math.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"volume_hu": torch.zeros(N, N)},
            ValueError,
            "low_dose: volume_hu must be (D, H, W), got (24, 24); drop or add an axis",
        ),
        (
            {"volume_hu": torch.zeros(1, N, N, dtype=torch.int16)},
            TypeError,
            "low_dose: volume_hu must be floating point, got torch.int16; pass volume_hu.float()",
        ),
        (
            {"volume_hu": HOLED},
            ValueError,
            "low_dose: volume_hu must be finite, got 576 NaN or infinite voxels; fill them with -1000",
        ),
        (
            {"voxel_mm": (5.0, 1.0, 0.0)},
            ValueError,
            "low_dose: voxel_mm must be three positive numbers, got (5.0, 1.0, 0.0); pass (dz, dy, dx)",
        ),
        (
            {"voxel_mm": (5.0, 1.0, 1.5)},
            ValueError,
            "low_dose: pixels must be square, got dy = 1.0 and dx = 1.5 mm; resample the slices first",
        ),
        (
            {"i0_photons": 0.0},
            ValueError,
            "low_dose: i0_photons must be positive, got 0.0; pass for example 3e4",
        ),
        (
            {"electronic_noise_photons": -1.0},
            ValueError,
            "low_dose: electronic_noise_photons must not be negative, got -1.0; pass for example 3.2",
        ),
        (
            {"dose_fraction": 1.5},
            ValueError,
            "low_dose: dose_fraction must lie in (0, 1], got 1.5; pass 0.25, or None",
        ),
        (
            {"mu_water_per_mm": 0.0},
            ValueError,
            "low_dose: mu_water_per_mm must be positive, got 0.0; pass 0.0193",
        ),
        (
            {"beam": ParallelBeam(16, 4, 10.0)},
            ValueError,
            "low_dose: beam is for (16, 16) pixels of 10.0 mm but the volume has (24, 24) of 10.0 mm; "
            "pass beam=ParallelBeam((24, 24), n_views, 10.0)",
        ),
        (
            {"beam": BEAM, "fluence": torch.zeros(3)},
            ValueError,
            f"low_dose: fluence must be ({BEAM.n_bins},) positive numbers, got (3,); "
            "pass fluence=bowtie_fluence(beam.bin_mm, radius_mm)",
        ),
        (
            {"beam": BEAM, "kernel": "B30f"},
            ValueError,
            "fbp: kernel must be one of ramp, shepp-logan, cosine, hamming, hann, got 'B30f'; pass kernel='hann'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_say_what_to_do(arguments, error, message):
    valid = {"volume_hu": cylinder(), "voxel_mm": VOXEL_MM, "i0_photons": 1e4, "generator": 0, "n_views": 4}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        low_dose(**(valid | arguments))


@pytest.mark.parametrize(
    ("radius_mm", "strength", "message"),
    [
        (0.0, 0.5, "bowtie_fluence: radius_mm must be positive, got 0.0; pass about 160.0"),
        (90.0, 2.0, "bowtie_fluence: strength must lie in [0, 1], got 2.0; pass strength=0.5"),
    ],
)
def test_bowtie_errors_say_what_to_do(radius_mm, strength, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bowtie_fluence(BEAM.bin_mm, radius_mm, strength)
