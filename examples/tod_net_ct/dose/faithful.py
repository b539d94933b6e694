"""Low dose by GE's CatSim (XCIST): a fan beam with a spectrum, a focal spot and an energy-integrating detector."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..run import Settings
from .projector import ParallelBeam
from .simulate import AIR_HU, MU_WATER_PER_MM

SOURCE_TO_CENTRE_MM, SOURCE_TO_DETECTOR_MM = 540.0, 950.0
COLUMN_OFFSET = 0.25  # a quarter of a column, so that opposite views interleave
_ONE_AT_A_TIME = threading.Lock()  # CatSim's library keeps its phantom and its random numbers in global variables


def check_catsim(settings: Settings) -> None:
    """Refuse before any work what this route cannot do.

    Raises:
        ValueError: without gecatsim, or for a dose fraction.
    """
    if importlib.util.find_spec("gecatsim") is None:
        raise ValueError("route: catsim needs gecatsim; install it as docs/simulation.md says, or use --set route=fast")
    if settings.dose_fraction:
        raise ValueError("dose_fraction: the route catsim takes scans for noiseless; use --set route=fast")


def catsim_low_dose(
    normal_hu: Tensor, voxel_mm: tuple[float, float, float], settings: Settings, seed: int
) -> tuple[Tensor, Tensor]:
    r"""The volume `(D, H, W)` with the noise of a scanner, and that noise's standard deviation in each slice.

    $$\mathrm{low} = \mathrm{normal} + \frac{1000}{\mu_w}\big(\mathrm{FBP}(\tilde p) - \mathrm{FBP}(p)\big)$$

    Every slice is scanned by itself, with `settings.n_views` readings a rotation, columns as wide as a pixel at the
    centre, and a tube current such that `settings.i0_photons` are detected along the central ray through air. So the
    photons per ray, and the rays per slice, are those of the fast route.

    Units:
        HU, mm and photons.

    Approximation:
        All tissue is water of the density that gives its HU. `mu_w` is the water value of the slice's own noiseless
        reconstruction. No scatter, crosstalk or lag (CatSim can; its defaults do not).
    """
    _, height, width = normal_hu.shape
    beam = ParallelBeam((height, width), settings.n_views, voxel_mm[2])
    low, stds = torch.empty_like(normal_hu), []
    for i, plane in enumerate(normal_hu):
        density = 1 + plane.clamp(min=AIR_HU) / 1000
        clean, noisy = (parallel(s, beam) for s in fan_scan(density, voxel_mm, settings, (seed, i), beam))
        image = beam.fbp(clean[None], settings.kernel)[0]
        mu_water = float((image * density).sum() / density.square().sum()) if density.any() else MU_WATER_PER_MM
        noise_hu = beam.fbp((noisy - clean)[None], settings.kernel)[0] * (1000 / mu_water)
        low[i] = plane + noise_hu
        stds.append(noise_hu.std())
    return low, torch.stack(stds)


def parallel(fan: np.ndarray, beam: ParallelBeam) -> Tensor:
    """Rebin a full rotation `(n_views, n_columns)` to the parallel rays of `beam`, by cubic splines.

    A ray at angle `theta` and distance `s` is in the fan at the source angle `theta - asin(s / R)`, and again from the
    other side; the two are averaged, so that no photon is lost.
    """
    from scipy.ndimage import map_coordinates

    n_views, n_columns = fan.shape
    gamma = np.arcsin(beam.bin_mm.numpy() / SOURCE_TO_CENTRE_MM)
    theta = np.arange(beam.n_views)[:, None] * (math.pi / beam.n_views)
    margin = 8  # views repeated at either end, because the rotation closes
    fan = np.concatenate([fan[-margin:], fan, fan[:margin]])
    both = []
    for angle, fan_angle in ((theta, gamma), (theta + math.pi, -gamma)):
        view = (angle - fan_angle) / math.tau * n_views % n_views + margin
        column = fan_angle / _column_angle(beam) + (n_columns - 1) / 2 - COLUMN_OFFSET
        both.append(map_coordinates(fan, [view, np.broadcast_to(column, view.shape)], order=3, mode="nearest"))
    return torch.from_numpy((both[0] + both[1]) / 2).to(beam.bin_mm)


def faithful(cfg: Any, view: int, part: int) -> Any:
    """CatSim's detection hook, which it finds by this module's name: read each view without and with noise."""
    from gecatsim.pyfiles.Detection_EI import Detection_EI

    arriving, wanted = cfg.thisSubView.copy(), (cfg.sim.enableQuantumNoise, cfg.sim.eNoise)
    if view == part == 0:
        cfg.views = ([], [])
    for views, (quantum, electronic) in zip(cfg.views, ((0, 0.0), wanted), strict=True):
        cfg.sim.enableQuantumNoise, cfg.sim.eNoise = quantum, electronic
        cfg.thisSubView, cfg.thisView = arriving.copy(), None if part == 0 else views.pop()
        views.append(Detection_EI(cfg, view, part).thisView)  # adds this part of the view to the ones before
    return cfg


def fan_scan(
    density: Tensor, voxel_mm: tuple[float, float, float], settings: Settings, seed: tuple[int, int], beam: ParallelBeam
) -> tuple[np.ndarray, np.ndarray]:
    """Line integrals of one slice, without and with noise: `(n_views, n_columns)` each."""
    half_mm = beam.n_bins * beam.pixel_mm / 2
    if half_mm > 0.95 * SOURCE_TO_CENTRE_MM:
        raise ValueError(f"route: a slice's diagonal of {2 * half_mm:.0f} mm does not fit catsim's gantry; use fast")
    with tempfile.TemporaryDirectory() as folder, _ONE_AT_A_TIME, _hushed(), _numpy_seed(seed) as c_seed:
        import gecatsim
        from gecatsim.pyfiles.set_rndseed import set_rndseed

        ct = gecatsim.CatSim()
        ct.resultsName = f"{folder}/scan"
        ct.phantom.filename = _write_phantom(Path(folder), density, voxel_mm)
        ct.phantom.projectorNumThreads = 1
        scanner, protocol = ct.scanner, ct.protocol
        scanner.detectorColSize = 2 * SOURCE_TO_DETECTOR_MM * math.tan(_column_angle(beam) / 2)
        scanner.detectorColCount = 2 * math.ceil(math.asin(half_mm / SOURCE_TO_CENTRE_MM) / _column_angle(beam)) + 8
        scanner.detectorColOffset = COLUMN_OFFSET
        scanner.detectorRowsPerMod = scanner.detectorRowCount = 1
        scanner.detectorRowSize = voxel_mm[0] * SOURCE_TO_DETECTOR_MM / SOURCE_TO_CENTRE_MM
        scanner.sid, scanner.sdd = SOURCE_TO_CENTRE_MM, SOURCE_TO_DETECTOR_MM
        protocol.viewsPerRotation = protocol.viewCount = settings.n_views
        protocol.stopViewId = settings.n_views - 1
        protocol.bowtie = "large.txt" if settings.bowtie else []

        protocol.mA = 1
        air = ct.air_scan()
        photons = (air.detFlux * air.sim.Wvec)[scanner.detectorColCount // 2]  # along the central ray, by energy
        one_photon = scanner.detectionGain * float((photons * air.sim.Evec).sum() / photons.sum())  # electrons
        protocol.mA = settings.i0_photons / float(photons.sum())
        scanner.eNoise = settings.electronic_noise_photons * one_photon
        bright = air.thisView * protocol.mA

        scanner.detectionCallback = __name__
        set_rndseed(ct.cfg, c_seed)
        scan = ct.phantom_scan()
        clean, noisy = (-np.log(np.maximum(np.stack(views), one_photon) / bright) for views in scan.views)
    return clean, noisy


def _write_phantom(folder: Path, density: Tensor, voxel_mm: tuple[float, float, float]) -> str:
    """CatSim's file of one slice, thicker than it is so that the diverging beam stays within."""
    density.flip(0).numpy().astype(np.float32).tofile(folder / "density.raw")  # its y runs up
    rows, columns = density.shape
    phantom = {
        "n_materials": 1, "mat_name": ["water"],
        "volumefractionmap_filename": ["density.raw"], "volumefractionmap_datatype": ["float"],
        "cols": [columns], "rows": [rows], "slices": [1],
        "x_size": [voxel_mm[2]], "y_size": [voxel_mm[2]], "z_size": [10 * voxel_mm[0]],
        "x_offset": [(columns + 1) / 2], "y_offset": [(rows + 1) / 2], "z_offset": [1.0],
    }  # fmt: skip
    (folder / "phantom.json").write_text(json.dumps(phantom))
    return str(folder / "phantom.json")


@contextlib.contextmanager
def _numpy_seed(seed: tuple[int, int]) -> Iterator[int]:
    """Seed numpy's global generator, which CatSim uses, and put it back; lends a seed for CatSim's other generator."""
    state = np.random.get_state()
    ours, theirs = np.random.SeedSequence(seed).generate_state(2)
    np.random.seed(ours)
    try:
        yield int(theirs) % 10**8  # it is multiplied by ten and must stay below 2**31
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what CatSim prints, in Python and in C, and without the warning that numpy.matlib will go."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.filterwarnings("ignore", message="Importing from numpy.matlib is deprecated")
            warnings.filterwarnings("ignore", category=ResourceWarning)  # it leaves its small files to the collector
            yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def _column_angle(beam: ParallelBeam) -> float:
    """Angle of one detector column, as wide as a pixel at the centre of rotation."""
    return 2 * math.atan(beam.pixel_mm / 2 / SOURCE_TO_CENTRE_MM)
