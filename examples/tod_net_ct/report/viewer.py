"""What the page's case viewer carries: slices in the window as bytes, truth and predictions as bits, kept small."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dose import to_unit
from ..evaluation import title
from .plots import Pictures, body_of

MAX_VOXELS = 4_500_000  # over all cases and images: noise hardly packs, so about as many characters on the page
MAX_SIDE = 256  # pixels; a larger slice is averaged down
MIN_SLICES = 12


def viewer_data(shown: Sequence[Pictures], networks: Sequence[str], max_voxels: int = MAX_VOXELS) -> dict[str, Any]:
    """The cases for `viewer.js`, fewer slices and then fewer cases of them where all would make the page too heavy.

    Every volume is bytes, grey 0 to 255 over the window or one bit per mask (bit 0 the truth, bit 1 the first task
    network ...). A byte is stored as its difference to its left neighbour, deflated, in base64: a browser undoes that
    in a few lines, and exactly, which it does not promise for pictures.
    """
    kept = list(shown)
    while True:
        sides = [_sides(case) for case in kept]
        per_slice = sum(height * width * len(case.images) for case, (height, width) in zip(kept, sides, strict=True))
        n_slices = int(max_voxels // max(per_slice, 1))
        if n_slices >= min(MIN_SLICES, max(case.mask.shape[0] for case in kept)) or len(kept) == 1:
            break
        kept.pop()
    cases = [_one_case(case, side, networks, max(1, n_slices)) for case, side in zip(kept, sides, strict=True)]
    return {"networks": [title(name) for name in networks], "cases": cases}


def _sides(case: Pictures) -> tuple[int, int]:
    rows, columns = body_of(case)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    shrink = max(1.0, height / MAX_SIDE, width / MAX_SIDE)
    return max(1, round(height / shrink)), max(1, round(width / shrink))


def _one_case(case: Pictures, side: tuple[int, int], networks: Sequence[str], n_slices: int) -> dict[str, Any]:
    rows, columns = body_of(case)
    chosen = _slices(case.mask, n_slices)

    def grey(volume_hu: Tensor) -> str:
        unit = to_unit(volume_hu[chosen][:, rows, columns].float())
        if unit.shape[1:] != side:
            unit = F.interpolate(unit[None], size=side, mode="area")[0]
        return _packed((255 * unit).round().to(torch.uint8))

    def bits(masks: Sequence[Tensor]) -> str:
        sum_of_bits = torch.zeros(len(chosen), *side, dtype=torch.uint8)
        for bit, mask in enumerate(masks):
            part = mask[chosen][:, rows, columns].to(torch.uint8)
            if part.shape[1:] != side:
                part = F.interpolate(part[None].float(), size=side, mode="nearest-exact")[0].to(torch.uint8)
            sum_of_bits += part << bit
        return _packed(sum_of_bits)

    dz, dy, dx = case.voxel_mm
    height, width = side
    return {
        "name": case.case,
        "depth": len(chosen),
        "height": height,
        "width": width,
        "tall": (rows.stop - rows.start) * dy / ((columns.stop - columns.start) * dx),  # height over width, in mm
        "slices": chosen,
        "n_slices": case.mask.shape[0],
        "slice_mm": dz,
        "images": [
            {
                "name": name,
                "title": title(name),
                "grey": grey(volume),
                "bits": bits([case.mask, *(case.found[name][network] for network in networks)]),
            }
            for name, volume in case.images.items()
        ],
    }


def _slices(mask: Tensor, n: int) -> list[int]:
    """At most `n` slices, evenly spaced: of the whole case if they fit, else of the organ and a tenth around it."""
    depth = mask.shape[0]
    first, last = 0, depth - 1
    organ = mask.any(2).any(1).nonzero().flatten()
    if n < depth and len(organ):
        margin = max(2, len(organ) // 10)
        first, last = max(0, int(organ[0]) - margin), min(last, int(organ[-1]) + margin)
    step = -(-(last - first + 1) // n)
    return list(range(first, last + 1, step))


def _packed(volume: Tensor) -> str:
    values = volume.numpy()
    change = np.diff(values, axis=-1, prepend=np.zeros_like(values[..., :1]))  # modulo 256
    return base64.b64encode(zlib.compress(change.tobytes(), 9)).decode()
