"""Who serves for training, validation and test: whole patients, drawn by a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..run import Settings

SPLITS = ("train", "validation", "test")
_TRY_OUT = "let patients serve in several splits, for trying out only, with --set reuse=true"


def split_patients(patients: Sequence[str], settings: Settings) -> dict[str, list[str]]:
    """Deal the patients: ``n_train``, ``n_validation`` and ``n_test`` of them, or all by ``split`` if ``n_train`` is 0.

    With ``reuse`` a folder of too few serves for trying out: each split gets its number all the same, test patients
    other than those of training for as long as there are any.

    Raises:
        ValueError: there are too few patients, or the shares are no shares.
    """
    patients = list(dict.fromkeys(patients))
    if settings.test_patients:
        return _by_name(patients, settings)
    counts = _counts(len(patients), settings)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    shuffled = [patients[i] for i in order]
    dealing = SPLITS
    if sum(counts.values()) > len(patients):
        if not settings.reuse:
            raise ValueError(
                f"{settings.data}: holds {_people(len(patients))} but the splits need {sum(counts.values())}; "
                + ("split all of them with --set n_train=0, or " if len(patients) > 2 else "add some, or ")
                + _TRY_OUT
            )
        dealing = ("train", "test", "validation")
    dealt, start = {}, 0
    for name in dealing:
        n = min(counts[name], len(patients))
        dealt[name] = [shuffled[(start + i) % len(patients)] for i in range(n)]
        start += n
    return {name: dealt[name] for name in SPLITS}


def _by_name(patients: Sequence[str], settings: Settings) -> dict[str, list[str]]:
    """The named patients for test and validation, everyone else for training."""
    named = {"validation": settings.validation_patients, "test": settings.test_patients}
    for split, names in named.items():
        for name in names:
            if name not in patients:
                raise ValueError(
                    f"{split}_patients: expected some of {', '.join(patients)}, got {name!r}; "
                    f"--set {split}_patients={patients[0]}"
                )
    both = sorted(set(named["validation"]) & set(named["test"]))
    if both:
        raise ValueError(f"test_patients: expected no one of validation_patients, got {', '.join(both)} in both")
    rest = [patient for patient in patients if patient not in {*named["validation"], *named["test"]}]
    dealt = {"train": rest} | {split: list(names) for split, names in named.items()}
    for split, patients_of in dealt.items():
        if not patients_of:
            raise ValueError(f"test_patients: expected someone for {split}, got no one left; name fewer patients")
    return {split: dealt[split] for split in SPLITS}


def shared_patients(dealt: dict[str, list[str]]) -> list[str]:
    """Those who serve in more than one split."""
    everyone = [patient for patients in dealt.values() for patient in patients]
    return sorted({patient for patient in everyone if everyone.count(patient) > 1})


def _counts(n_patients: int, settings: Settings) -> dict[str, int]:
    if settings.n_train:
        counts = dict(zip(SPLITS, (settings.n_train, settings.n_validation, settings.n_test), strict=True))
        if min(counts.values()) < 0:
            raise ValueError(f"n_train, n_validation, n_test: expected no negative number, got {counts}")
        return counts
    if min(settings.split) <= 0 or not math.isclose(sum(settings.split), 1, abs_tol=1e-6):
        raise ValueError(
            f"split: expected three shares that add up to 1, got {settings.split}; --set split=0.7,0.1,0.2"
        )
    n_train, n_validation = (math.floor(n_patients * share + 1e-9) for share in settings.split[:2])
    counts = dict(zip(SPLITS, (n_train, n_validation, n_patients - n_train - n_validation), strict=True))
    if settings.reuse:
        return {name: max(1, n) for name, n in counts.items()}
    if min(counts.values()) < 1:
        raise ValueError(
            f"split: {_people(n_patients)} at {settings.split} leave "
            + ", ".join(f"{n} for {name}" for name, n in counts.items())
            + "; give numbers with --set n_train=... --set n_validation=... --set n_test=..., or "
            + _TRY_OUT
        )
    return counts


def _people(n: int) -> str:
    return f"{n} patient" + "s" * (n != 1)
