"""Where the cases of a data set lie: one table of layouts, and one way to pair what belongs together."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .dicom_folder import is_dicom_file

Labels = Mapping[str, tuple[int, ...]]


class Case(NamedTuple):
    """A scan and what belongs to it.

    Attributes:
        name: as in the data set: `volume-12` in LiTS's layout, `case_00012` in KiTS's.
        patient: all cases of a patient stay in one split.
        scan: the normal dose, a NIfTI file or the folder of a DICOM series.
        label: the segmentation; None where a dose pair has none.
        low: the real low dose; None where it is to be simulated.
        labels: label numbers by organ; None where the data set does not say.
    """

    name: str
    patient: str
    scan: Path
    label: Path | None = None
    low: Path | None = None
    labels: Labels | None = None


@dataclass(frozen=True)
class Layout:
    """A rule for file names: `path` with `{name}` and `{role}`, and what each word for the role stands for."""

    title: str
    path: str
    roles: Mapping[str, str]  # the word in the file name -> scan, label or low; the first of a kind is the usual one
    name: str = ".+?"
    case: str = "{name}"
    patient: str = "(.+)"
    labels: Labels | None = None
    ending: str = ""  # a regular expression for what may follow
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        words = "|".join(map(re.escape, self.roles))
        pattern = re.escape(self.path).replace(r"\{name\}", f"(?P<name>{self.name})")
        pattern = pattern.replace(r"\{role\}", f"(?P<role>{words})") + self.ending
        object.__setattr__(self, "pattern", re.compile(pattern))

    @property
    def is_dose_pair(self) -> bool:
        return "low" in self.roles.values()


LITS = {"liver": (1, 2), "tumour": (2,)}
KITS = {"kidney": (1, 2, 3), "tumour": (2,)}  # 3 is KiTS21's cyst: its own "kidney and masses" counts it, too
DOSES = {"_full": "scan", "_normal": "scan", "_quarter": "low", "_low": "low"}
MASKS = {"_mask": "label", "_label": "label", "_seg": "label"}
LAYOUTS = (
    Layout(
        "LiTS", "{role}-{name}", {"volume": "scan", "segmentation": "label"}, r"\d+", case="volume-{name}", labels=LITS
    ),
    Layout(
        "KiTS",
        "case_{name}/{role}",
        {"imaging": "scan", "segmentation": "label"},
        r"\d+",
        case="case_{name}",
        labels=KITS,
    ),
    Layout("Decathlon", "{role}/{name}", {"imagesTr": "scan", "labelsTr": "label"}, ending="(_0000)?"),
    Layout("dose pairs", "{name}{role}", DOSES | MASKS, "[^/]+?", patient="([^_]+)"),
    Layout(
        "dose pairs in folders", "{role}/{name}", {"normal": "scan", "low": "low", "masks": "label"}, patient="([^_]+)"
    ),
    Layout("folders of scans and masks", "{role}/{name}", {"scans": "scan", "masks": "label"}),
    Layout("a folder per case", "{name}/{role}", {"scan": "scan", "mask": "label", "segmentation": "label"}, "[^/]+"),
)
ANY_PAIR = Layout("scans and masks", "{name}{role}", MASKS | {"": "scan"}, "[^/]+?")  # matches every file: the last


def find_cases(folder: str | os.PathLike[str]) -> list[Case]:
    """Find the cases of a folder in any of these layouts, in the order of their numbers.

    - LiTS: `volume-N.nii[.gz]`, `segmentation-N.nii[.gz]`
    - KiTS: `case_NNNNN/imaging.nii.gz`, `segmentation.nii.gz`
    - Medical Segmentation Decathlon: `imagesTr/liver_N.nii.gz`, `labelsTr/liver_N.nii.gz`, `dataset.json` if there
    - scans and masks: `NAME.nii.gz`, `NAME_mask.nii.gz` (or `_label`, `_seg`); or `scans/NAME`, `masks/NAME`
    - a folder per case: `NAME/scan` (a DICOM series, or `scan.nii.gz`), or `NAME/*.dcm`, and `NAME/mask.nii.gz` (or
      `segmentation.nii.gz`)
    - real dose pairs: `NAME_full.nii.gz`, `NAME_quarter.nii.gz`; or `normal/NAME`, `low/NAME`; masks are optional; the
      patient is what comes before the first `_` of the name

    A folder may stand for a NIfTI file wherever it holds a DICOM series. A file `patients.csv` with lines
    `case,patient` says which cases are of one patient; without it, each case is a patient, save for dose pairs. Scans
    that the layout does not know are named in a warning.

    Raises:
        ValueError: the folder is missing or holds no layout, a partner is missing, or one case has two files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder.name}: expected a folder of cases, got no such folder at {folder}; check the path")
    entries = dict(_entries(folder))
    layout = _layout_of(entries)
    if layout is None:
        raise ValueError(
            f"{folder.name}: expected volume-N.nii, case_NNNNN/imaging.nii.gz, imagesTr/NAME.nii.gz, NAME.nii.gz with "
            "NAME_mask.nii.gz, NAME_full.nii.gz with NAME_quarter.nii.gz, or NAME/scan with a DICOM series, got none; "
            "give the folder that holds the cases themselves"
        )
    strays = sorted(entries.keys() - _matches(layout, entries).keys())
    if strays:
        listed = ", ".join(strays[:5]) + (f" and {len(strays) - 5} more" if len(strays) > 5 else "")
        warnings.warn(
            f"{folder.name}: passed over what is no case of the layout {layout.title}: {listed}", stacklevel=2
        )
    labels = _decathlon_labels(folder / "dataset.json") if layout.title == "Decathlon" else layout.labels
    cases = []
    for files in _paired(layout, entries, folder).values():
        name = layout.case.format(name=files["name"])
        patient = re.match(layout.patient, name)
        label, low = (entries.get(files.get(kind, "")) for kind in ("label", "low"))
        cases.append(Case(name, patient[1] if patient else name, entries[files["scan"]], label, low, labels))
    return _by_patients_file(sorted(cases, key=lambda case: _natural(case.name)), folder / "patients.csv")


def organ_labels(case: Case, organ: str) -> tuple[int, ...] | None:
    """The label numbers that make the organ: those given (`organ="1,2"`), or the data set's own; None for every
    number above 0, where the data set does not say what they mean.

    Raises:
        ValueError: the data set does not label this organ.
    """
    if re.fullmatch(r"\d+(,\d+)*", organ):
        return tuple(int(number) for number in organ.split(","))
    if case.labels is None:
        return None
    if organ not in case.labels:
        known = "; ".join(f"{name} ({', '.join(map(str, numbers))})" for name, numbers in case.labels.items())
        raise ValueError(
            f"{case.name}: this data set labels {known}, got the organ {organ!r}; "
            f"--set organ={next(iter(case.labels))}, or label numbers such as --set organ=1,2"
        )
    return case.labels[organ]


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every scan in the folder and the folders inside it: its path without suffix, and where it is."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):  # the Decathlon's archives hold macOS's "._" files
            continue
        if re.search(r"\.nii(\.gz)?$", path.name):
            yield relative.as_posix(), path
        elif path.is_dir() and _is_series(path):
            # NAME/*.dcm is NAME/scan with the series one level up, unless a layout puts folders there (scans/NAME)
            yield (relative / "scan" if len(relative.parts) == 1 else relative).as_posix(), path


def _is_series(folder: Path) -> bool:
    companions = (".nii", ".gz", ".json", ".csv", ".txt", ".md")
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return any(path.suffix.lower() not in companions and is_dicom_file(path) for path in files)


def _layout_of(entries: Mapping[str, Path]) -> Layout | None:
    """The layout that knows most of the scans; a mask alone counts only where nothing else does."""

    def known(layout: Layout) -> tuple[int, int]:
        kinds = [layout.roles[match["role"]] for match in _matches(layout, entries).values()]
        n_labels = kinds.count("label")
        n_images = len(kinds) - n_labels
        return n_images, 0 if layout.is_dose_pair and not n_images else n_labels

    best = max(LAYOUTS, key=known)
    if any(known(best)):
        return best
    return ANY_PAIR if any(known(ANY_PAIR)) else None


def _matches(layout: Layout, entries: Mapping[str, Path]) -> dict[str, re.Match[str]]:
    found = {entry: layout.pattern.fullmatch(_stem(entry)) for entry in entries}
    return {entry: match for entry, match in found.items() if match is not None}


def _paired(layout: Layout, entries: Mapping[str, Path], folder: Path) -> dict[str, dict[str, str]]:
    """The entries of each case by kind (scan, label, low), and its name as the scan spells it."""
    cases: dict[str, dict[str, str]] = {}
    for entry, match in _matches(layout, entries).items():
        key = str(int(match["name"])) if match["name"].isdigit() else match["name"]
        kind = layout.roles[match["role"]]
        files = cases.setdefault(key, {})
        if kind in files:
            raise ValueError(f"{entry}: expected one file per case, got {files[kind]} too; remove one")
        files[kind] = entry
        if kind == "scan" or "name" not in files:
            files["name"] = match["name"]
    for files in cases.values():
        for kind in ("scan", "low") if layout.is_dose_pair else ("scan", "label"):
            if kind not in files:
                there = next(files[other] for other in ("scan", "low", "label") if other in files)
                word = next(word for word, meant in layout.roles.items() if meant == kind)
                suffix = there[len(_stem(there)) :] or ("" if kind == "scan" else ".nii.gz")
                wanted = layout.path.format(name=files["name"], role=word) + suffix
                raise ValueError(
                    f"{wanted}: expected the partner of {there}, got no such file; add it, or take the case out of "
                    f"{folder.name}"
                )
    return cases


def _decathlon_labels(path: Path) -> Labels | None:
    """Label numbers by organ from `dataset.json`; a lesion belongs to the organ where there is one organ only."""
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text())["labels"]
        turned = all(str(key).isdigit() for key in stated)  # {"1": "liver"}; nnU-Net 2 writes {"liver": 1}
        pairs = [(str(name), int(number)) for name, number in ((v, k) if turned else (k, v) for k, v in stated.items())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path.name}: expected "labels": {{"1": "liver", ...}}, got something else; mend the file, or take it out '
            "and give label numbers, as in --set organ=1,2"
        ) from error
    pairs = [(name.lower(), number) for name, number in pairs if number > 0]
    lesions = tuple(number for name, number in pairs if re.search("cancer|tumou?r|lesion|cyst|mass", name))
    organs = [(name, number) for name, number in pairs if number not in lesions]
    if len(organs) == 1:
        return {organs[0][0]: (organs[0][1], *lesions)} | {name: (n,) for name, n in pairs if n in lesions}
    return {name: (number,) for name, number in pairs}


def _by_patients_file(cases: list[Case], path: Path) -> list[Case]:
    """The cases with the patients that a file tells; a line that is passed over could hide that two are of one."""
    if not path.is_file():
        return cases
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a mark before the first line
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path.name}: expected lines 'case,patient' in UTF-8, got another file; write it again"
        ) from error
    patients: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if not any(row):
            continue
        if len(row) != 2 or not all(row):
            raise ValueError(f"{path.name}: expected 'case,patient' in line {number}, got {','.join(row)!r}; mend it")
        if patients.setdefault(row[0], row[1]) != row[1]:
            raise ValueError(
                f"{path.name}: expected one patient for {row[0]}, got {patients[row[0]]} and in line {number} "
                f"{row[1]}; take one out"
            )
    for case in cases:
        if case.name not in patients:
            raise ValueError(f"{path.name}: expected a line 'case,patient' for {case.name}, got none; add it")
    return [case._replace(patient=patients[case.name]) for case in cases]


def _stem(entry: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", entry)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
