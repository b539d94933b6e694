"""Gradient maps as one self-contained page: slices to scroll, terms to switch, values under the pointer."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """A volume ``(slices, rows, columns)`` to look at, with its grey levels; class indices in colour."""

    name: str
    volume: Tensor
    window: tuple[float, float]
    is_classes: bool = False


@dataclass(frozen=True)
class Row:
    """A term: its gradient ``(slices, rows, columns)`` and what the table tells of it."""

    name: str
    title: str
    volume: Tensor
    weight: float | None
    norm: float
    share: float | None = None
    ratio: float | None = None


def write_page(
    path: str | Path, images: Sequence[Picture], rows: Sequence[Row], roi: Tensor | None, first: int, start: int
) -> Path:
    """Write the page whole or not at all.

    Args:
        path: The file.
        images: What the left picture can show.
        rows: Terms, for the right picture.
        roi: Mask ``(slices, rows, columns)``.
        first: Index of the image that is shown first.
        start: Index of the slice that is shown first.
    """
    data = {
        "shape": list(rows[0].volume.shape) if rows else list(images[0].volume.shape),
        "start": start,
        "first": first,
        "roi": None if roi is None else {"kind": "bytes", "data": _packed((roi != 0).to(torch.uint8))},
        "images": [
            {
                "name": image.name,
                "low": image.window[0],
                "high": image.window[1],
                "classes": image.is_classes,
                "packed": _halves(image.volume),
            }
            for image in images
        ],
        "terms": [
            {
                **{key: getattr(row, key) for key in ("name", "title")},
                **{key: _finite(getattr(row, key)) for key in ("weight", "norm", "share", "ratio")},
                "limit": _limit(row.volume),
                "packed": _halves(row.volume),
            }
            for row in rows
        ],
    }
    # A name may hold anything; "<" is all that could end the script it is put into.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = resources.files("taskloss").joinpath("page.html").read_text(encoding="utf-8").replace("/*DATA*/", text)
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def grey_levels(volume: Tensor) -> tuple[float, float]:
    """The least and the largest finite value."""
    finite = volume[torch.isfinite(volume)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)


def _halves(volume: Tensor) -> Mapping[str, object]:
    """Half precision after division by a power of two, so that no gradient is too small for it."""
    volume = volume.detach().double().cpu()
    peak = float(volume[torch.isfinite(volume)].abs().max()) if torch.isfinite(volume).any() else 0.0
    scale = 2.0 ** (math.frexp(peak)[1] - 15) if peak else 1.0
    return {"kind": "halves", "scale": scale, "data": _packed((volume / scale).half())}


def _packed(tensor: Tensor) -> str:
    return base64.b64encode(zlib.compress(tensor.contiguous().numpy().tobytes(), 6)).decode("ascii")


def _limit(volume: Tensor) -> float:
    """The 99.5th percentile of the magnitude over the volume: one colour scale for all of its slices."""
    magnitude = volume.detach().abs().flatten().float().cpu()
    magnitude = magnitude[torch.isfinite(magnitude)]
    if not magnitude.numel():
        return 1.0
    rank = max(1, math.ceil(0.995 * magnitude.numel()))  # torch.quantile refuses more than 16 million values
    return float(magnitude.kthvalue(rank).values) or float(magnitude.max()) or 1.0


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number
