"""Stage 2: the low-dose counterpart of every prepared case, over processes, a Dask cluster or an array of jobs."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..run import (
    Dose,
    Seed,
    Settings,
    begin,
    check_intact,
    decisive,
    digest,
    finish,
    is_done,
    load_tensors,
    one_thread,
    only,
    progress,
    save_tensors,
)
from .projector import KERNELS, ParallelBeam
from .simulate import bowtie_fluence, low_dose

BOWTIE_RADIUS_MM = 160.0  # of the water cylinder that the bowtie half evens out: about an abdomen
SLICES = 16  # in float at a time, so that a scan of 450 slices of 512 x 512 takes its 16-bit files' memory
DASK_TIMEOUT_S = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``simulate``: where the work is done, never what comes out."""
    parser.add_argument("--jobs", type=int, help="processes (default: the setting jobs); -1 for one per core")
    parser.add_argument(
        "--dask", default="", metavar="ADDRESS", help="a Dask scheduler, for example tcp://10.0.0.1:8786"
    )
    parser.add_argument("--shard", default="", metavar="I/N", help="do only part I of N (from 1): one job of an array")


def degrade(settings: Settings, run: Path, *, jobs: int | None = None, dask: str = "", shard: str = "") -> Path:
    """Write ``low_dose/<case>.pt`` with ``low_hu`` (int16) and ``noise_std_hu`` (one number per slice).

    A case's noise depends on its number and ``settings.seed`` alone. Cases that hold a measured ``low_hu`` are copied.
    Cases that an interrupted run left are kept. With a shard, the manifest is written once all cases are there.

    Args:
        settings: What to simulate.
        run: Folder of the run, with ``cases``.
        jobs: Processes; None takes the setting, -1 one per core.
        dask: Address of a Dask scheduler, whose workers see the same folder; it takes the place of ``jobs``.
        shard: ``"i/n"``: only every n-th case, from the i-th, counted from 1.

    Raises:
        ValueError: for cases that were not prepared, a setting that makes no sense, or a scheduler out of reach.
    """
    folder, cases = run / "low_dose", run / "cases"
    jobs = settings.jobs if jobs is None else jobs
    settings = only(settings, Seed, Dose)
    check(settings, run)
    part, parts = _parse(shard)
    facts = decisive(settings) | {"cases": digest(cases / "manifest.json")}
    if is_done(folder, facts):
        return folder
    begin(folder, facts)
    numbered = numbered_cases(run)
    todo = [(i, path) for i, path in numbered[part::parts] if not (folder / path.name).exists()]
    work = functools.partial(_simulate_case, settings, folder.resolve())
    for _ in progress(_spread(work, todo, jobs, dask), "simulate low dose", len(todo)):
        pass
    missing = [path.stem for _, path in numbered if not (folder / path.name).exists()]
    if missing:
        print(f"{folder}: {len(missing)} of {len(numbered)} cases are left to other shards, such as {missing[0]}")
        return folder
    finish(folder, facts, **_summary([folder / path.name for _, path in numbered]))
    return folder


def simulate_volume(
    normal_hu: Tensor, voxel_mm: tuple[float, float, float], settings: Settings, seed: int
) -> dict[str, Tensor]:
    """One volume `(D, H, W)` at the settings' dose: ``low_hu`` (int16), ``noise_std_hu`` and ``readings``.

    ``readings`` counts those below one photon, and all; it is zero for the route "catsim", which tells neither.
    """
    if settings.route == "catsim":
        from .faithful import catsim_low_dose

        low_hu, std = catsim_low_dose(normal_hu.float(), voxel_mm, settings, seed)
        return {"low_hu": _as_int16(low_hu), "noise_std_hu": std, "readings": torch.zeros(2, dtype=torch.int64)}
    beam = _matrices(tuple(normal_hu.shape[1:]), settings.n_views).with_pixel_mm(voxel_mm[2])
    generator = torch.Generator().manual_seed(seed)  # slices draw in order: batches change nothing
    low_hu = torch.empty(normal_hu.shape, dtype=torch.int16)
    stds, n_clamped, n_rays = [], 0, 0
    for at in range(0, len(normal_hu), SLICES):
        batch = low_dose(
            normal_hu[at : at + SLICES].float(),
            voxel_mm,
            settings.i0_photons,
            generator=generator,
            electronic_noise_photons=settings.electronic_noise_photons,
            dose_fraction=settings.dose_fraction or None,
            kernel=settings.kernel,
            fluence=bowtie_fluence(beam.bin_mm, BOWTIE_RADIUS_MM) if settings.bowtie else None,
            beam=beam,
        )
        low_hu[at : at + SLICES] = _as_int16(batch.volume_hu)
        stds.append(batch.noise_std_hu)
        n_clamped, n_rays = n_clamped + batch.n_clamped, n_rays + batch.n_rays
    return {"low_hu": low_hu, "noise_std_hu": torch.cat(stds), "readings": torch.tensor([n_clamped, n_rays])}


def numbered_cases(run: Path) -> list[tuple[int, Path]]:
    """Every prepared case with its number, which is its place in order of name; not what a killed stage left."""
    return list(enumerate(sorted((run / "cases").resolve().glob("[!.]*.pt"))))


def case_seed(settings: Settings, number: int) -> int:
    """The seed of a case's noise."""
    return 1_000_003 * (settings.seed + 1) + number


def voxel_of(case: dict[str, Tensor]) -> tuple[float, float, float]:
    """A case's own voxel size `(dz, dy, dx)`."""
    dz, dy, dx = case["voxel_mm"].tolist()
    return dz, dy, dx


def check(settings: Settings, run: Path) -> None:
    """Refuse in one sentence what cannot be simulated, before any work."""
    cases = run / "cases"
    if not (cases / "manifest.json").is_file():
        raise ValueError(f"{cases}: holds no prepared cases; run the command prepare first")
    check_intact(cases)
    check_dose(settings)


def check_dose(settings: Settings) -> None:
    """Refuse in one sentence a dose that cannot be simulated."""
    if settings.route not in ("fast", "catsim"):
        raise ValueError(f"route: expected fast or catsim, got {settings.route!r}; for example --set route=fast")
    if settings.kernel not in KERNELS:
        raise ValueError(
            f"kernel: expected one of {', '.join(KERNELS)}, got {settings.kernel!r}; try --set kernel=hann"
        )
    if not 0 <= settings.dose_fraction <= 1:
        raise ValueError(f"dose_fraction: expected 0 (off) to 1, got {settings.dose_fraction}; try dose_fraction=0.25")
    if settings.route == "catsim":
        from .faithful import check_catsim

        check_catsim(settings)


def _simulate_case(settings: Settings, folder: Path, number: int, path: Path) -> None:
    with one_thread():
        case = load_tensors(path)
        if "low_hu" in case:  # a measured pair
            save_tensors(folder / path.name, low_hu=case["low_hu"])
            return
        try:
            made = simulate_volume(case["normal_hu"], voxel_of(case), settings, case_seed(settings, number))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        save_tensors(folder / path.name, **made)


@functools.lru_cache(maxsize=2)  # 150 MB each for 512 x 512 pixels and 720 views
def _matrices(size: tuple[int, int], n_views: int) -> ParallelBeam:
    return ParallelBeam(size, n_views)


def _spread(work: Callable[[int, Path], None], todo: list[Any], jobs: int, dask: str) -> Iterator[None]:
    """Do the work in other processes, or here for one; an item is yielded whenever a case is done."""
    from joblib import Parallel, delayed, parallel_config

    with contextlib.ExitStack() as stack:
        if dask:
            from distributed import Client

            try:
                stack.enter_context(Client(dask, timeout=DASK_TIMEOUT_S))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"--dask {dask}: no scheduler answers; start one with `dask scheduler` and pass its address"
                ) from error
            stack.enter_context(parallel_config("dask"))
        else:
            stack.enter_context(parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1))
        try:
            # Cases are long and few: handed out one at a time.
            yield from Parallel(return_as="generator_unordered", batch_size=1)(delayed(work)(*item) for item in todo)
        except BrokenExecutor as error:
            raise ValueError(
                "simulate: a process was killed, most often for want of memory (a scan of 512 x 512 x 450 takes about "
                "2 GB); what is done is kept, so run it again with fewer --jobs"
            ) from error


def _summary(paths: list[Path]) -> dict[str, Any]:
    """What the manifest tells of all cases, whoever made them."""
    readings, std, measured = torch.zeros(2, dtype=torch.int64), {}, []
    for path in paths:
        made = torch.load(path, weights_only=True, mmap=True)  # the volume itself stays on disk
        if "readings" in made:
            readings += made["readings"]
            std[path.stem] = round(float(made["noise_std_hu"].mean()), 3)
        else:
            measured.append(path.stem)
    n_clamped, n_rays = readings.tolist()
    return {"n_clamped": n_clamped, "n_rays": n_rays, "noise_std_hu": std, "measured": measured}


def _as_int16(volume_hu: Tensor) -> Tensor:
    return volume_hu.round().clamp(-32768, 32767).to(torch.int16)


def _parse(shard: str) -> tuple[int, int]:
    """The index from 0 and the number of parts; ``(0, 1)`` for no shard."""
    if not shard:
        return 0, 1
    try:
        i, n = (int(word) for word in shard.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 1 <= i <= n:
        raise ValueError(f"--shard {shard}: expected i/n with i from 1 to n, for example --shard 1/8")
    return i - 1, n
