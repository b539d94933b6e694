"""What the stages share: a folder that knows whether its work is done, and a progress bar with the time left."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from .files import checksum, read_json, replacing, write_text
from .settings import Settings

Item = TypeVar("Item")
PACKAGES = (
    "taskloss", "torch", "monai", "lightning-fabric", "numpy", "scikit-image", "scipy", "nibabel", "pydicom", "joblib",
    "gecatsim",
)  # fmt: skip


def is_done(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether this folder holds the finished result of exactly these facts."""
    manifest = _manifest(folder)
    return manifest is not None and _agree(manifest["facts"], facts)


def begin(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Make a stage's folder ready for its work; True where the same work was begun before and may be taken up.

    Otherwise the folder is emptied: an old manifest must not vouch for new files, nor old files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # first: killed from here on, the stage counts as not done
    begun = folder / "begun.json"
    with contextlib.suppress(ValueError):
        if _agree(read_json(begun), facts):
            return True
    begun.unlink(missing_ok=True)
    for path in folder.glob("*.pt"):
        path.unlink()
    write_text(begun, json.dumps(_plain(facts)))
    return False


def finish(folder: Path, facts: Mapping[str, Any], **results: Any) -> None:
    """Write the folder's manifest: what it was made from, with which versions, and what came out."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    files = {path.name: [path.stat().st_size, checksum(path)] for path in _made(folder)}
    manifest = {
        "facts": facts,
        "results": results,
        "files": files,
        "packages": {"python": platform.python_version(), **packages},
    }
    write_text(folder / "manifest.json", json.dumps(_plain(manifest), indent=2))
    (folder / "begun.json").unlink(missing_ok=True)
    _INTACT[folder.resolve()] = _stamp(folder)


def check_intact(folder: Path) -> None:
    """Compare a finished stage's files with its manifest, once in a process: none missing, foreign or changed.

    A stage that is not finished has no manifest, and nothing to compare with.

    Raises:
        ValueError: the manifest is damaged, or a file is not the one that the stage wrote.
    """
    stamp = _stamp(folder)
    if _INTACT.get(folder.resolve()) == stamp or not (folder / "manifest.json").exists():
        return
    manifest = _manifest(folder)
    again = f"remove the folder {folder} and start again"
    if manifest is None:
        raise ValueError(f"{folder / 'manifest.json'}: expected a stage's manifest, got a damaged file; {again}")
    known = manifest.get("files")
    if isinstance(known, dict):  # a run of an earlier version wrote no checksums: nothing can be told
        there = {path.name: path for path in _made(folder)}
        for name in sorted(known.keys() | there.keys()):
            if name not in there:
                raise ValueError(f"{folder / name}: expected the file that the stage wrote, got none; {again}")
            if name not in known:
                raise ValueError(
                    f"{there[name]}: expected the {len(known)} files that the stage wrote, got this one, too; "
                    f"take it out, or {again}"
                )
            if [there[name].stat().st_size, checksum(there[name])] != known[name]:
                raise ValueError(
                    f"{there[name]}: expected the file as the stage wrote it, got a damaged or changed one; {again}"
                )
    _INTACT[folder.resolve()] = stamp


_INTACT: dict[Path, object] = {}  # folders that this process wrote or checked, and the state in which it did


def _made(folder: Path) -> list[Path]:
    """What a stage leaves behind: its files but for its own notes and for the point that a training resumes from."""
    notes = ("manifest.json", "begun.json", "last.pt")
    return [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in notes and not p.name.startswith(".")]


def _stamp(folder: Path) -> object:
    try:
        return [(path.name, (about := path.stat()).st_mtime_ns, about.st_size) for path in _made(folder)]
    except OSError:
        return None


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none that can be used."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ValueError:
        return None
    whole = isinstance(manifest.get("facts"), dict) and isinstance(manifest.get("results"), dict)
    return manifest if whole else None


def take_twin(folder: Path, facts: Mapping[str, Any], name: str) -> bool:
    """Copy the finished work of a neighbour that differs in the fact `name` alone, a mere name; False without one."""
    for neighbour in sorted(folder.parent.glob("*/manifest.json")):
        manifest = _manifest(neighbour.parent)
        if manifest is not None and _agree({**manifest["facts"], name: None}, {**facts, name: None}):
            check_intact(neighbour.parent)
            begin(folder, facts)
            for path in _made(neighbour.parent):
                if path.is_file():
                    with replacing(folder / path.name) as unfinished:
                        shutil.copyfile(path, unfinished)
            finish(folder, facts, **manifest["results"])
            return True
    return False


def results_of(folder: Path) -> dict[str, Any]:
    """What a finished stage wrote down."""
    manifest = _manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder}: expected the manifest of a finished stage, got none or a damaged one; remove the folder and "
            "start again"
        )
    results: dict[str, Any] = manifest["results"]
    return results


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Go through items under a bar that tells the time left; a plain line where nobody watches."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    quiet = os.environ.get("TASKLOSS_QUIET") == "1"
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task(title, total=total if total is not None else len(items), note="")  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: processes share the cores, and the sums' order does not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _agree(recorded: Any, facts: Mapping[str, Any]) -> bool:
    """Whether what a manifest recorded are these facts. A setting that it does not know, being older, counts as having
    had its default: so a run folder of an earlier version is taken up.
    """
    if not isinstance(recorded, dict) or not recorded:  # an empty one vouches for nothing
        return False
    plain = _plain(facts)
    unknown = {name: value for name, value in _plain(Settings().to_dict()).items() if name in plain}
    return {**unknown, **recorded} == plain


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
