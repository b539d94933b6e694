"""Parallel-beam projection, its exact adjoint, and filtered back-projection, by the Fourier-slice theorem.

The 1-D Fourier transform of a parallel projection is a radial line through the image's 2-D transform. So a
projection is an FFT of the image, an interpolation from the square frequency grid to radial lines, and an
inverse FFT of every line. The interpolation is Kaiser-Bessel gridding on a grid of twice the image's side:
one real sparse matrix, and its transpose for the adjoint.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KERNELS", "ParallelBeam"]

_WIDTH = 6  # Kaiser-Bessel width, in samples of the oversampled grid
_OVERSAMPLING = 2
# The shape that keeps aliasing lowest for this width and this grid: Beatty et al. (2005), Eq. 5.
_BETA = math.pi * math.sqrt((_WIDTH / _OVERSAMPLING) ** 2 * (_OVERSAMPLING - 0.5) ** 2 - 0.8)

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "ramp": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: torch.cos(math.pi * f / 2),
    "hamming": lambda f: 0.54 + 0.46 * torch.cos(math.pi * f),
    "hann": lambda f: 0.5 + 0.5 * torch.cos(math.pi * f),
}
"""Reconstruction kernels: apodisation of the ramp against frequency, in units of the Nyquist frequency."""


class _Linear(torch.autograd.Function):
    """A linear map whose derivative is its adjoint, and whose adjoint's derivative is the map again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pair = (apply, adjoint)
        return apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        apply, adjoint = ctx.pair
        return _Linear.apply(grad, adjoint, apply), None, None


class _SparseMatrix(nn.Module):
    """A real matrix in compressed rows; plain buffers, because torch cannot deep-copy a CSR tensor."""

    start: Tensor
    index: Tensor
    value: Tensor

    def __init__(self, start: Tensor, index: Tensor, value: Tensor, n_columns: int) -> None:
        super().__init__()
        self.n_columns = n_columns
        for name, part in (("start", start), ("index", index), ("value", value)):
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply complex vectors `(N, ...)` of `n_columns` entries; the result is `(N, n_rows)`."""
        shape = (len(self.start) - 1, self.n_columns)
        with warnings.catch_warnings():
            # torch announces once that its CSR layout is in beta; all that is used of it is this product.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            matrix = torch.sparse_csr_tensor(self.start, self.index, self.value, shape, check_invariants=False)
        n = len(x)
        dense = torch.view_as_real(x.reshape(n, -1)).transpose(0, 1).flatten(1)  # (n_columns, 2 N)
        return torch.view_as_complex((matrix @ dense).unflatten(1, (n, 2)).transpose(0, 1).contiguous())


class ParallelBeam(nn.Module):
    r"""Project images along parallel rays over 180 degrees, and reconstruct them.

    $$p(\theta, s) = \int f(s\cos\theta - t\sin\theta,\; s\sin\theta + t\cos\theta)\,dt, \qquad
    \hat p(\theta, \sigma) = \hat f(\sigma\cos\theta, \sigma\sin\theta)$$

    `x` runs along the columns and `y` down the rows, both from the image's geometric centre; view `i` has the
    angle `180 i / n_views` degrees. The detector spans the image's diagonal, with bins as wide as a pixel.
    Both maps are differentiable, any number of times.

    Args:
        size: Side of a square image in pixels, or `(H, W)`; a non-square image is zero-padded to a square.
        n_views: Number of views, evenly spread over 180 degrees.
        pixel_mm: Side of a pixel.
        dtype: `torch.float32` or `torch.float64`.

    Shape:
        - image: `(N, H, W)`
        - sinogram: `(N, n_views, n_bins)`

    Units:
        `pixel_mm` in mm; a sinogram is in units of the image times mm.

    Approximation:
        The pixels are samples of an image that is band-limited to the disc of radius Nyquist, so that a sharp
        edge rings by about one per cent of the maximum near its shadow; a smooth image is exact. Focal spot,
        bin aperture, beam divergence and scatter are absent. Gridding errs by about 6e-6 of the maximum.
        The two matrices hold 36 weights each per frequency sample: 150 MB for 512 x 512 pixels and 720 views.

    Raises:
        ValueError: If a size, a number of views, a pixel side or a tensor's shape makes no sense.
        TypeError: If `dtype` is not float32 or float64, or a tensor does not match it.

    Example:
        >>> beam = ParallelBeam(64, n_views=90, pixel_mm=4.0)
        >>> image = torch.zeros(1, 64, 64)
        >>> image[:, 20:40, 24:44] = 1.0
        >>> beam.project(image).shape
        torch.Size([1, 90, 92])
        >>> bool((beam.fbp(beam.project(image), "ramp") - image).abs().mean() < 0.02)
        True

    Reference:
        A. C. Kak and M. Slaney, Principles of Computerized Tomographic Imaging, 1988, Secs. 3.2 and 3.3.
        P. J. Beatty, D. G. Nishimura and J. M. Pauly, "Rapid gridding reconstruction with a minimal
        oversampling ratio", IEEE Trans. Med. Imaging 24(6), 2005.
    """

    _rows: Tensor
    _columns: Tensor
    _phase: Tensor
    _twice: Tensor

    def __init__(
        self,
        size: int | tuple[int, int],
        n_views: int,
        pixel_mm: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 2:
            raise ValueError(
                f"ParallelBeam: size must be at least 2 x 2 pixels, got {height} x {width}; pass size=(H, W)"
            )
        if n_views < 1:
            raise ValueError(f"ParallelBeam: n_views must be at least 1, got {n_views}; pass for example n_views=720")
        if not 0 < pixel_mm < math.inf:
            raise ValueError(f"ParallelBeam: pixel_mm must be positive, got {pixel_mm}; pass the pixel's side in mm")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"ParallelBeam: dtype must be float32 or float64, got {dtype}; pass dtype=torch.float32")
        side = max(height, width)
        self.shape = (height, width)
        self.n_views = n_views
        self.pixel_mm = float(pixel_mm)
        # As wide as the diagonal, and of the image's parity so that view 0 has one bin per column.
        self.n_bins = side + 2 * math.ceil((math.hypot(height, width) - side) / 2)
        self._grid = _OVERSAMPLING * side

        angle = torch.arange(n_views, dtype=torch.float64) * (math.pi / n_views)
        radius = torch.arange(self.n_bins // 2 + 1, dtype=torch.float64) / self.n_bins  # cycles per pixel
        frequency_x = radius * torch.cos(angle)[:, None]
        frequency_y = radius * torch.sin(angle)[:, None]
        self._interpolate, self._spread = _interpolation(frequency_y, frequency_x, self._grid, dtype)
        # The centre of an even side lies half a pixel beside a grid point, and bin 0 half a detector to the
        # left; either is a phase along the line.
        half_x, half_y = 0.5 * (width % 2 == 0), 0.5 * (height % 2 == 0)
        shift = frequency_x * half_x + frequency_y * half_y + radius * (self.n_bins - 1) / 2
        phase = torch.view_as_real(torch.polar(torch.ones_like(shift), -2 * math.pi * shift))
        # The real part's adjoint counts every frequency twice but zero and (for an even length) Nyquist.
        twice = torch.full_like(radius, 2.0)
        twice[0] = 1.0
        if self.n_bins % 2 == 0:
            twice[-1] = 1.0
        buffers = {"rows": _deapodisation(height, self._grid), "columns": _deapodisation(width, self._grid)}
        for name, value in (buffers | {"phase": phase, "twice": twice}).items():
            self.register_buffer(f"_{name}", value.to(dtype), persistent=False)

    def extra_repr(self) -> str:
        return f"size={self.shape}, n_views={self.n_views}, n_bins={self.n_bins}, pixel_mm={self.pixel_mm}"

    def with_pixel_mm(self, pixel_mm: float) -> ParallelBeam:
        """The same projector for pixels of another side; the matrices are shared, and move to a device together."""
        if not 0 < pixel_mm < math.inf:
            raise ValueError(f"with_pixel_mm: pixel_mm must be positive, got {pixel_mm}; pass the pixel's side in mm")
        other = copy.copy(self)
        other.pixel_mm = float(pixel_mm)
        return other

    @property
    def bin_mm(self) -> Tensor:
        """Signed distance in mm of every bin's ray from the centre of rotation, shape `(n_bins,)`."""
        index = torch.arange(self.n_bins, dtype=self._twice.dtype, device=self._twice.device)
        return (index - (self.n_bins - 1) / 2) * self.pixel_mm

    def project(self, image: Tensor) -> Tensor:
        """Line integrals `(N, n_views, n_bins)` of images `(N, H, W)`, in units of the image times mm."""
        self._check("project", "image", image, self.shape)
        return _Linear.apply(image, self._project, self._backproject)

    def backproject(self, sinogram: Tensor) -> Tensor:
        """The exact adjoint of `project`: `<project(image), sinogram> == <image, backproject(sinogram)>`."""
        self._check("backproject", "sinogram", sinogram, (self.n_views, self.n_bins))
        return _Linear.apply(sinogram, self._backproject, self._project)

    def fbp(self, sinogram: Tensor, kernel: str = "hann") -> Tensor:
        r"""Filtered back-projection: the image whose line integrals the sinogram holds.

        $$f(x, y) = \int_0^\pi (p_\theta * h)(x\cos\theta + y\sin\theta)\,d\theta, \qquad
        \hat h(\sigma) = |\sigma|\,w(\sigma)$$

        Args:
            sinogram: Line integrals.
            kernel: Apodisation `w` of the ramp, a name in `KERNELS`; "ramp" is the sharpest and "hann" the
                softest.

        Shape:
            `(N, n_views, n_bins)` to `(N, H, W)`.

        Units:
            Units of the sinogram per mm.

        Approximation:
            The ramp is sampled in space, on a finite detector. Fewer views than about 1.6 times the side in
            pixels leave streaks far from the centre; "hann" blurs an edge over about two pixels.

        Raises:
            ValueError: If the kernel is unknown or the shape is not this scanner's.

        Reference:
            A. C. Kak and M. Slaney, Principles of Computerized Tomographic Imaging, 1988, Sec. 3.3.
        """
        self._check("fbp", "sinogram", sinogram, (self.n_views, self.n_bins))
        if kernel not in KERNELS:
            raise ValueError(f"fbp: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}; pass kernel='hann'")
        n = 2 * self.n_bins  # twice the detector, so that the convolution does not wrap around
        tap = torch.fft.fftfreq(n, 1 / n, dtype=sinogram.dtype, device=sinogram.device)
        odd = tap.remainder(2) == 1
        ramp = torch.where(odd, -1 / (math.pi * tap).square(), torch.zeros_like(tap))
        ramp[0] = 0.25
        frequency = torch.linspace(0, 1, n // 2 + 1, dtype=sinogram.dtype, device=sinogram.device)
        response = torch.fft.rfft(ramp).real * KERNELS[kernel](frequency)
        filtered = torch.fft.irfft(torch.fft.rfft(sinogram, n) * response, n)[..., : self.n_bins]
        return self.backproject(filtered) * (math.pi / self.n_views / self.pixel_mm**2)

    def _project(self, image: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(F.pad(image / self._rows[:, None] / self._columns, self._padding()))
        lines = self._interpolate(spectrum).unflatten(1, (self.n_views, -1))
        lines = lines * torch.view_as_complex(self._phase)
        return torch.fft.irfft(lines, self.n_bins) * self.pixel_mm

    def _backproject(self, sinogram: Tensor) -> Tensor:
        lines = torch.fft.rfft(sinogram) * torch.view_as_complex(self._phase).conj()
        lines = lines * (self._twice * (self.pixel_mm / self.n_bins))
        spectrum = self._spread(lines).unflatten(1, (self._grid, self._grid))
        image = torch.fft.ifft2(spectrum, norm="forward").real
        # A negative padding crops.
        return F.pad(image, [-n for n in self._padding()]) / self._rows[:, None] / self._columns

    def _padding(self) -> list[int]:
        """Margins (left, right, top, bottom) that centre the image on the oversampled grid."""
        height, width = self.shape
        left, top = (self._grid - width + 1) // 2, (self._grid - height + 1) // 2
        return [left, self._grid - width - left, top, self._grid - height - top]

    def _check(self, where: str, name: str, x: Tensor, shape: tuple[int, int]) -> None:
        if x.ndim != 3 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"{where}: {name} must be (N, {shape[0]}, {shape[1]}), got {tuple(x.shape)}; "
                f"add the batch axis with {name}[None], or build a ParallelBeam of this size"
            )
        if x.dtype != self._twice.dtype:
            raise TypeError(
                f"{where}: {name} must be {self._twice.dtype} as the projector, got {x.dtype}; "
                f"build it with ParallelBeam(..., dtype={x.dtype}) or convert the {name}"
            )


def _deapodisation(n: int, grid: int) -> Tensor:
    """Fourier transform of the Kaiser-Bessel kernel along one axis, by which gridding scales the image."""
    offset = torch.arange(n, dtype=torch.float64) - n // 2  # from the grid's middle, in pixels
    z = torch.sqrt(_BETA**2 - (math.pi * _WIDTH * offset / grid).square())
    return _WIDTH * torch.sinh(z) / z


def _interpolation(y: Tensor, x: Tensor, grid: int, dtype: torch.dtype) -> tuple[_SparseMatrix, _SparseMatrix]:
    """Matrix from the frequency grid to samples at `(y, x)` cycles per pixel, and its transpose."""

    def neighbours(frequency: Tensor) -> tuple[Tensor, Tensor]:
        position = frequency.reshape(-1, 1) * grid
        index = torch.ceil(position - _WIDTH / 2) + torch.arange(_WIDTH)
        inside = (1 - (2 * (position - index) / _WIDTH).square()).clamp(min=0)
        # The image sits in the middle of its grid, which alternates the sign of its spectrum.
        sign = 1 - 2 * index.remainder(2)
        return index.remainder(grid).int(), torch.special.i0(_BETA * inside.sqrt()) * sign

    (row, row_weight), (column, column_weight) = neighbours(y), neighbours(x)
    index = (row[:, :, None] * grid + column[:, None, :]).flatten(1)
    weight = (row_weight[:, :, None] * column_weight[:, None, :]).flatten(1).to(dtype)
    index, order = index.sort(dim=1)
    weight = weight.gather(1, order)
    n_samples, n_weights = index.shape
    start = torch.arange(n_samples + 1, dtype=torch.int32) * n_weights
    forward = _SparseMatrix(start, index.flatten(), weight.flatten(), grid**2)

    order = index.flatten().argsort(stable=True)
    start = F.pad(torch.bincount(index.flatten(), minlength=grid**2).cumsum(0), (1, 0)).int()
    adjoint = _SparseMatrix(start, (order // n_weights).int(), weight.flatten()[order], n_samples)
    return forward, adjoint
