"""Two acquisitions under one SeriesInstanceUID: told apart before their slices are interleaved into one volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .dicom_folder import name_of

_SAME = (  # one value in an acquisition; several may follow each other along the body, but not alternate
    *("AcquisitionNumber", "AcquisitionUID", "IrradiationEventUID", "TemporalPositionIdentifier"),
    *("NominalPercentageOfCardiacPhase", "ConvolutionKernel", "KVP", "ContrastBolusAgent", "ImageType", "EchoNumbers"),
)
_RUNNING = ("InstanceNumber", "AcquisitionTime", "ContentTime")  # a run of values along the body
_MOST = 4  # acquisitions that are looked for where only running values tell


def check_one_acquisition(headers: Sequence[Any]) -> None:
    """Refuse slices, in order along the body, that alternate between acquisitions.

    A scan in steps has several acquisitions, one behind the other; that is no mixture. A mixture has their slices in
    turns: values that differ come back after others, or running numbers and times fall into two or more runs that
    take turns slice by slice.

    Raises:
        ValueError: naming the tag that tells and two slices.
    """
    for keyword in _SAME:
        values = [_spelled(header.get(keyword)) for header in headers]
        _refuse_where(_returns(values), headers, keyword)
    for keyword in _RUNNING:
        numbers = _numbers(headers, keyword)
        if numbers is not None:
            _refuse_where(_take_turns(numbers), headers, keyword)


def check_one_content(headers: Sequence[Any], stack: np.ndarray) -> None:
    """Refuse slices `(n, rows, columns)` of which every second resembles the next but one more than its neighbour.

    Slices of one scan change little by little. Two contrast phases, or two breath-holds, laid between each other do
    not, whatever their tags say.

    Raises:
        ValueError: naming two neighbours.
    """
    if len(stack) < 8:
        return
    step = max(1, min(stack.shape[1:]) // 64)
    small = stack[:, ::step, ::step].clip(-1024, 1024).astype(np.float32)
    near = np.abs(np.diff(small, axis=0)).mean((1, 2))
    far = np.abs(small[2:] - small[:-2]).mean((1, 2))
    if np.median(near) > 1.5 * np.median(far) and np.mean(np.minimum(near[1:], near[:-1]) > far) > 0.9:
        _refuse_where(1, headers, "content")


def _spelled(value: Any) -> str:
    """One spelling of a value: 120 and 120.0 are the same."""
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def _returns(values: Sequence[str]) -> int | None:
    """Where a value comes back after another; None for values in blocks."""
    finished = set()
    for k in range(1, len(values)):
        if values[k] != values[k - 1]:
            finished.add(values[k - 1])
            if values[k] in finished:
                return k
    return None


def _take_turns(numbers: np.ndarray) -> int | None:
    """Whether every n-th number belongs to a run of its own, n from 2: 1, 21, 2, 22, 3, 23 ..."""
    for n in range(2, _MOST + 1):
        runs = [numbers[k::n] for k in range(n)]
        if len(numbers) < 3 * n:
            continue
        steps = [np.diff(run) for run in runs]
        ordered = all((s >= 0).all() or (s <= 0).all() for s in steps)
        ends = sorted((run.min(), run.max()) for run in runs)
        apart = all(one[1] < other[0] for one, other in zip(ends, ends[1:], strict=False))
        if ordered and apart:
            return 1
    return None


def _numbers(headers: Sequence[Any], keyword: str) -> np.ndarray | None:
    try:
        return np.array([float(str(header.get(keyword)).replace(":", "")) for header in headers])
    except ValueError:  # a slice without the tag: it tells nothing
        return None


def _refuse_where(at: int | None, headers: Sequence[Any], keyword: str) -> None:
    if at is None:
        return
    raise ValueError(
        f"{name_of(headers[at])}: expected the slices of one acquisition, got another's between them (by {keyword}, "
        f"beside {name_of(headers[at - 1])}); give each acquisition a folder of its own"
    )
