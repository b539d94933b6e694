"""Is this volume in Hounsfield units? What a look at its values tells, before anything is made of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_LOOK = 4_000_000  # voxels that shares are taken of: a look, not a census


def check_hu(path: Path, volume_hu: Tensor, *, assume_hu: bool = False) -> None:
    """Refuse values that are not HU: NaN, and whatever is plainly another unit.

    HU are negative in air and fat, and soft tissue lies near 40; a scan shows this whatever its window. A volume of one
    value says nothing and passes.

    Args:
        path: for the sentence.
        volume_hu: any shape.
        assume_hu: ask for finite values alone; the caller knows that they are HU (an organ cut out, a test object).

    Raises:
        ValueError: in one sentence, what the values look like and what to do about it.
    """
    # The extremes tell of NaN and infinity, too, and cost no second volume.
    low, high = (float(value) for value in torch.aminmax(volume_hu))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        bad = int((~torch.isfinite(volume_hu)).sum())
        raise ValueError(
            f"{path.name}: expected a finite HU in every voxel, got {bad} NaN or infinite; "
            "replace them, for example by -1024 outside the field of view"
        )
    if assume_hu or low == high:
        return
    found = _other_unit(volume_hu, low, high)
    if found is not None:
        looks, mend = found
        raise ValueError(
            f"{path.name}: expected HU (air near -1000), got values from {low:g} to {high:g}, {looks}; "
            f"{mend}, or say that they are HU with --assume-hu (--set assume_hu=true in a run)"
        )


def _other_unit(volume_hu: Tensor, low: float, high: float) -> tuple[str, str] | None:
    """What the values look like if not HU, and how to mend it; None for HU."""
    if low >= -1 and high <= 1:
        return "a scaled image", "convert it back to HU"
    if high - low < 100:
        if low >= 0 and bool((volume_hu == volume_hu.round()).all()):
            return "which look like class numbers", "give the image, not its segmentation"
        return "which look like a standardised image", "convert it back to HU"
    seen = volume_hu.flatten()[:: max(1, volume_hu.numel() // _LOOK)]
    values = seen[seen > low]
    if low >= 0 or not len(values):
        return _unsigned(high)
    if (low, high) == (-128, 127):
        return "which look like 8-bit grey levels", "convert them back to HU"
    # Scanners pad outside the field of view with one number far below all others; it says nothing of the unit.
    padded = float(values.min()) - low >= 500
    if padded and float(values.min()) >= 0 and len(values.unique()) > 16:
        return _unsigned(high)
    if len(values) >= 1000 and float((seen < -10).float().mean()) < 1e-3:
        return "with no air or fat in them, as in an MRI", "give the CT"
    if float((values < -1300).float().mean()) > 0.01 or float((seen > 3200).float().mean()) > 0.02:
        return "which spread too far, as if HU had been multiplied", "mend the file's slope"
    return None


def _unsigned(high: float) -> tuple[str, str]:
    if high <= 255:
        return "which look like 8-bit grey levels or class numbers", "convert them back to HU"
    return "which look like unsigned CT numbers", "subtract 1024, or give the CT if this is an MRI"
