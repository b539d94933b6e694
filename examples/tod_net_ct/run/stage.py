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

from .files import replacing, write_text

Item = TypeVar("Item")
PACKAGES = (
    "taskloss", "torch", "monai", "lightning-fabric", "numpy", "scikit-image", "scipy", "nibabel", "pydicom", "joblib",
    "gecatsim",
)  # fmt: skip


def is_done(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether this folder holds the finished result of exactly these facts."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return manifest.get("facts") == _plain(facts)


def begin(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Make a stage's folder ready for its work; True where the same work was begun before and may be taken up.

    Otherwise the folder is emptied: an old manifest must not vouch for new files, nor old files stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # first: killed from here on, the stage counts as not done
    begun = folder / "begun.json"
    with contextlib.suppress(OSError, json.JSONDecodeError):
        if json.loads(begun.read_text()) == _plain(facts):
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
    manifest = {
        "facts": facts,
        "results": results,
        "packages": {"python": platform.python_version(), **packages},
    }
    write_text(folder / "manifest.json", json.dumps(_plain(manifest), indent=2))
    (folder / "begun.json").unlink(missing_ok=True)


def take_twin(folder: Path, facts: Mapping[str, Any], name: str) -> bool:
    """Copy the finished work of a neighbour that differs in the fact `name` alone, a mere name; False without one."""
    for neighbour in sorted(folder.parent.glob("*/manifest.json")):
        try:
            manifest = json.loads(neighbour.read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if {**manifest.get("facts", {}), name: None} == {**_plain(facts), name: None}:
            begin(folder, facts)
            for path in neighbour.parent.iterdir():
                if path.is_file() and path.name != "manifest.json":
                    with replacing(folder / path.name) as unfinished:
                        shutil.copyfile(path, unfinished)
            finish(folder, facts, **manifest["results"])
            return True
    return False


def results_of(folder: Path) -> dict[str, Any]:
    """What a finished stage wrote down."""
    results: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["results"]
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


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
