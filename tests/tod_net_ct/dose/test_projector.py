"""Laws of the parallel-beam projector: adjointness, closed forms, conservation, inversion."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor

from examples.tod_net_ct.dose import ParallelBeam
from examples.tod_net_ct.dose.projector import KERNELS

DOUBLE = torch.float64
SIZES = [pytest.param(32, id="even"), pytest.param(33, id="odd"), pytest.param((20, 31), id="wide"),
         pytest.param((31, 20), id="tall")]  # fmt: skip


def noise(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixel_centres(n: int, pixel_mm: float) -> tuple[Tensor, Tensor]:
    at = (torch.arange(n, dtype=DOUBLE) - (n - 1) / 2) * pixel_mm
    return at[:, None], at[None, :]


def gaussian(n: int, pixel_mm: float, x_mm: float, y_mm: float, sigma_mm: float) -> Tensor:
    y, x = pixel_centres(n, pixel_mm)
    return torch.exp(-((x - x_mm).square() + (y - y_mm).square()) / (2 * sigma_mm**2))[None]


def distance_to_shadow(beam: ParallelBeam, x_mm: float, y_mm: float) -> Tensor:
    """Distance of every ray from a point, `(n_views, n_bins)`."""
    angle = torch.arange(beam.n_views, dtype=DOUBLE) * (math.pi / beam.n_views)
    return beam.bin_mm.to(DOUBLE) - (x_mm * angle.cos() + y_mm * angle.sin())[:, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_backproject_is_the_adjoint_of_project(size, dtype, tolerance):
    beam = ParallelBeam(size, n_views=17, pixel_mm=1.7, dtype=dtype)
    image, sinogram = noise(2, *beam.shape, dtype=dtype), noise(2, 17, beam.n_bins, dtype=dtype, seed=1)
    left, right = (beam.project(image) * sinogram).sum(), (image * beam.backproject(sinogram)).sum()
    scale = beam.project(image).norm() * sinogram.norm()
    assert abs(left - right) < tolerance * scale


def test_project_and_fbp_have_correct_first_and_second_derivatives():
    beam = ParallelBeam((4, 5), n_views=3, pixel_mm=2.0, dtype=DOUBLE)
    image = noise(1, 4, 5).requires_grad_()
    sinogram = noise(1, 3, beam.n_bins).requires_grad_()
    assert torch.autograd.gradcheck(beam.project, image)
    assert torch.autograd.gradcheck(beam.fbp, sinogram)
    assert torch.autograd.gradgradcheck(lambda x: beam.project(x).square().sum(), image)


def test_projection_is_linear_and_treats_images_of_a_batch_alike():
    beam = ParallelBeam(24, n_views=9, dtype=DOUBLE)
    a, b = noise(2, 24, 24), noise(2, 24, 24, seed=1)
    torch.testing.assert_close(beam.project(2 * a - 3 * b), 2 * beam.project(a) - 3 * beam.project(b))
    torch.testing.assert_close(beam.project(a)[1:], beam.project(a[1:]))


def test_another_pixel_size_shares_the_matrices_and_leaves_the_first_as_it_was():
    first, built = ParallelBeam((20, 31), n_views=9, pixel_mm=2.0), ParallelBeam((20, 31), n_views=9, pixel_mm=0.7)
    other = first.with_pixel_mm(0.7)
    image, sinogram = noise(1, 20, 31, dtype=torch.float32), noise(1, 9, built.n_bins, dtype=torch.float32)
    assert torch.equal(other.project(image), built.project(image))
    assert torch.equal(other.backproject(sinogram), built.backproject(sinogram))
    assert torch.equal(other.fbp(sinogram), built.fbp(sinogram))
    assert torch.equal(other.bin_mm, built.bin_mm) and first.pixel_mm == 2.0
    assert other._interpolate.value.data_ptr() == first._interpolate.value.data_ptr()


@pytest.mark.parametrize("n", [64, 65])
def test_a_gaussian_projects_to_its_closed_form(n):
    beam = ParallelBeam(n, n_views=31, pixel_mm=4.0, dtype=DOUBLE)
    sigma, x, y = 14.0, 30.0, -22.0
    ideal = sigma * math.sqrt(2 * math.pi) * torch.exp(-(distance_to_shadow(beam, x, y) / sigma).square() / 2)
    error = (beam.project(gaussian(n, 4.0, x, y, sigma))[0] - ideal).abs().max()
    assert error < 2e-5 * ideal.max()


def test_a_disc_projects_to_its_chords():
    n, pixel_mm, radius, x, y = 128, 2.0, 70.0, 20.0, -11.0
    beam = ParallelBeam(n, n_views=30, pixel_mm=pixel_mm, dtype=DOUBLE)
    # A sharp edge rings, so the disc is blurred by 1.5 pixels; its chords are blurred alike.
    blur_mm = 1.5 * pixel_mm
    rows, columns = pixel_centres(n, pixel_mm)
    reach = torch.arange(-4, 4.01, 0.0625, dtype=DOUBLE) * blur_mm
    weight = torch.exp(-(reach / blur_mm).square() / 2)
    weight = weight / weight.sum()
    disc = torch.zeros(1, n, n, dtype=DOUBLE)
    for dy, wy in zip(reach, weight, strict=True):
        half = (radius**2 - (rows - y - dy).square()).clamp(min=0).sqrt()
        # Gaussian blur along x of a segment, in closed form.
        edge = [torch.erf((columns - x + s * half) / (blur_mm * math.sqrt(2))) for s in (1, -1)]
        disc += wy * (edge[0] - edge[1]) / 2
    distance = distance_to_shadow(beam, x, y)
    chord = sum(
        w * 2 * (radius**2 - (distance - d).square()).clamp(min=0).sqrt() for d, w in zip(reach, weight, strict=True)
    )
    assert (beam.project(disc)[0] - chord).abs().max() < 5e-4 * 2 * radius


def test_every_view_holds_the_whole_mass():
    beam = ParallelBeam((40, 48), n_views=25, pixel_mm=3.0, dtype=DOUBLE)
    image = noise(2, 40, 48).abs()
    mass = beam.project(image).sum(-1) * beam.pixel_mm
    expected = image.sum((1, 2)) * beam.pixel_mm**2
    torch.testing.assert_close(mass, expected[:, None].expand_as(mass), rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [32, 33])
def test_a_quarter_turn_of_the_image_moves_the_views_by_half_their_number(n):
    beam = ParallelBeam(n, n_views=12, dtype=DOUBLE)
    image = noise(1, n, n)
    sinogram = beam.project(image)
    turned = beam.project(torch.rot90(image, dims=(1, 2)))  # counter-clockwise, as y runs down
    torch.testing.assert_close(turned[:, :6], sinogram[:, 6:], rtol=0, atol=1e-3)
    torch.testing.assert_close(turned[:, 6:], sinogram[:, :6].flip(-1), rtol=0, atol=1e-3)


def test_a_shift_moves_the_shadow_by_its_component_across_the_rays():
    beam = ParallelBeam(48, n_views=4, pixel_mm=2.0, dtype=DOUBLE)
    here = beam.project(gaussian(48, 2.0, 0.0, 0.0, 6.0))
    there = beam.project(gaussian(48, 2.0, 8.0, -6.0, 6.0))
    torch.testing.assert_close(there[:, 0], here[:, 0].roll(4, -1), rtol=0, atol=1e-3)  # along x
    torch.testing.assert_close(there[:, 2], here[:, 2].roll(-3, -1), rtol=0, atol=1e-3)  # along y


def test_view_zero_of_an_image_is_the_sum_of_its_columns():
    beam = ParallelBeam(32, n_views=3, pixel_mm=2.0, dtype=DOUBLE)
    image = gaussian(32, 2.0, 5.0, 3.0, 6.0)
    margin = (beam.n_bins - 32) // 2
    torch.testing.assert_close(beam.project(image)[0, 0, margin:-margin], 2.0 * image[0].sum(0), rtol=0, atol=1e-3)


def test_ramp_filtered_back_projection_recovers_a_smooth_image():
    beam = ParallelBeam(64, n_views=100, pixel_mm=4.0, dtype=DOUBLE)
    image = gaussian(64, 4.0, 30.0, -22.0, 14.0)
    assert (beam.fbp(beam.project(image), "ramp") - image).abs().max() < 1e-4


def test_reconstruction_improves_with_the_number_of_views():
    image = gaussian(64, 4.0, 30.0, -22.0, 10.0) - gaussian(64, 4.0, -60.0, 15.0, 8.0)
    errors = []
    for n_views in (10, 20, 40, 80):
        beam = ParallelBeam(64, n_views, pixel_mm=4.0, dtype=DOUBLE)
        errors.append(float((beam.fbp(beam.project(image), "ramp") - image).square().mean().sqrt()))
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors


def test_softer_kernels_pass_less_noise_and_keep_the_mean():
    beam = ParallelBeam(64, n_views=60, pixel_mm=4.0)
    white = noise(1, 60, beam.n_bins, dtype=torch.float32)
    spread = {kernel: float(beam.fbp(white, kernel).std()) for kernel in KERNELS}
    order = ["ramp", "shepp-logan", "cosine", "hamming", "hann"]
    assert sorted(spread, key=spread.__getitem__, reverse=True) == order
    wide = gaussian(64, 4.0, 0.0, 0.0, 40.0).float()
    for kernel in KERNELS:
        assert abs(float(beam.fbp(beam.project(wide), kernel)[0, 31:33, 31:33].mean()) - 1) < 0.02, kernel


@pytest.mark.parametrize(
    ("kernel", "half", "nyquist"),
    [("ramp", 1, 1), ("shepp-logan", 0.9003, 0.6366), ("cosine", 0.7071, 0), ("hamming", 0.54, 0.08), ("hann", 0.5, 0)],
)
def test_kernels_have_their_textbook_values(kernel, half, nyquist):
    values = KERNELS[kernel](torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(values, torch.tensor([1.0, half, nyquist]), rtol=0, atol=1e-4)


def test_projection_agrees_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    n, n_views = 65, 20
    image = gaussian(n, 1.0, 8.0, -10.0, 4.0) + 0.5 * gaussian(n, 1.0, -12.0, 5.0, 3.0)
    rows, columns = pixel_centres(n, 1.0)
    image[:, rows.square() + columns.square() > 31.5**2] = 0  # it insists, to the last bit
    beam = ParallelBeam(n, n_views, dtype=DOUBLE)
    ours = beam.project(image)[0]
    degrees = [-180 * i / n_views for i in range(n_views)]  # its y axis points up
    theirs = torch.from_numpy(transform.radon(image[0].numpy(), theta=degrees, circle=True).T.copy())
    margin = (beam.n_bins - n) // 2
    error = ours[:, margin : margin + n] - theirs
    assert error.norm() < 5e-3 * ours.norm()  # scikit-image rotates with linear interpolation


def test_projection_agrees_with_astra():
    astra = pytest.importorskip("astra")
    n, n_views = 64, 20
    image = gaussian(n, 1.0, 8.0, -10.0, 4.0)
    beam = ParallelBeam(n, n_views, dtype=DOUBLE)
    volume = astra.create_vol_geom(n, n)
    angles = [math.pi * i / n_views for i in range(n_views)]
    geometry = astra.create_proj_geom("parallel", 1.0, beam.n_bins, angles)
    projector = astra.create_projector("linear", geometry, volume)
    key, theirs = astra.create_sino(image[0].flip(0).numpy(), projector)  # its y axis points up
    astra.data2d.delete(key)
    ours = beam.project(image)[0]
    assert (ours - torch.from_numpy(theirs)).norm() < 5e-3 * ours.norm()


def test_a_projector_can_be_copied_and_converted_and_has_nothing_to_train_or_save():
    beam = ParallelBeam(16, n_views=6, dtype=DOUBLE)
    image = noise(1, 16, 16)
    torch.testing.assert_close(copy.deepcopy(beam).project(image), beam.project(image))
    single = copy.deepcopy(beam).to(torch.float32).project(image.float())
    torch.testing.assert_close(single, beam.project(image).float(), rtol=1e-5, atol=1e-5)
    assert not list(beam.parameters())
    assert not beam.state_dict()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    beam, image = ParallelBeam(32, n_views=20), noise(3, 32, 32, dtype=torch.float32)
    sinogram = beam.project(image)
    there = copy.deepcopy(beam).cuda()
    torch.testing.assert_close(there.project(image.cuda()).cpu(), sinogram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.fbp(sinogram.cuda()).cpu(), beam.fbp(sinogram), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda beam: ParallelBeam(1, 4),
            ValueError,
            "ParallelBeam: size must be at least 2 x 2 pixels, got 1 x 1; pass size=(H, W)",
        ),
        (
            lambda beam: ParallelBeam(8, 0),
            ValueError,
            "ParallelBeam: n_views must be at least 1, got 0; pass for example n_views=720",
        ),
        (
            lambda beam: ParallelBeam(8, 4, pixel_mm=0.0),
            ValueError,
            "ParallelBeam: pixel_mm must be positive, got 0.0; pass the pixel's side in mm",
        ),
        (
            lambda beam: ParallelBeam(8, 4, dtype=torch.float16),
            TypeError,
            "ParallelBeam: dtype must be float32 or float64, got torch.float16; pass dtype=torch.float32",
        ),
        (
            lambda beam: beam.with_pixel_mm(-1.0),
            ValueError,
            "with_pixel_mm: pixel_mm must be positive, got -1.0; pass the pixel's side in mm",
        ),
        (
            lambda beam: beam.project(torch.zeros(8, 8)),
            ValueError,
            "project: image must be (N, 8, 8), got (8, 8); "
            "add the batch axis with image[None], or build a ParallelBeam of this size",
        ),
        (
            lambda beam: beam.backproject(torch.zeros(1, 5, 12)),
            ValueError,
            "backproject: sinogram must be (N, 4, 12), got (1, 5, 12); "
            "add the batch axis with sinogram[None], or build a ParallelBeam of this size",
        ),
        (
            lambda beam: beam.project(torch.zeros(1, 8, 8, dtype=DOUBLE)),
            TypeError,
            "project: image must be torch.float32 as the projector, got torch.float64; "
            "build it with ParallelBeam(..., dtype=torch.float64) or convert the image",
        ),
        (
            lambda beam: beam.fbp(torch.zeros(1, 4, 12), "soft"),
            ValueError,
            "fbp: kernel must be one of ramp, shepp-logan, cosine, hamming, hann, got 'soft'; pass kernel='hann'",
        ),
    ],
    ids=["size", "views", "pixel", "dtype", "other-pixel", "image", "sinogram", "mixed-dtype", "kernel"],
)
def test_errors_say_what_to_do(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make(ParallelBeam(8, n_views=4))
