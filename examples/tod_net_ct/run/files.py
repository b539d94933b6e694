"""Files that are there whole or not at all, and that nothing executes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        OSError: in one sentence where the disk is full, whatever the library that wrote made of it.
    """
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex[:12]}-{path.name}")  # keeps the suffix: it picks gzip
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException as error:  # Ctrl-C counts
        unfinished.unlink(missing_ok=True)
        if _is_full_disk(error):
            sentence = f"{path}: expected room on the disk, got a full one; free some space and start again"
            raise OSError(errno.ENOSPC, sentence) from error
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether this failure began with a full disk: torch.save reports one as a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def digest(path: Path) -> str:
    """SHA-256 of a file, short."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def checksum(path: Path) -> int:
    """CRC-32 of a file: it tells damage, at the speed of the disk."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


def is_intact(path: Path) -> bool:
    """Whether every part of a file of ``torch.save`` has the checksum that stands beside it; torch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):  # a damaged table of contents
        return False


def read_json(path: Path, mend: str = "") -> dict[str, Any]:
    """Read a JSON object that this program wrote.

    Args:
        path: where.
        mend: what to do about a file that is no such; by default the folder is to be removed.

    Raises:
        ValueError: the file is missing, damaged, or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        got = f"a {type(content).__name__}"
    except FileNotFoundError:
        content, got = None, "no file"
    except (OSError, ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        content, got = None, "a damaged file"
    if not isinstance(content, dict):
        mend = mend or f"remove the folder {path.parent} and start again"
        raise ValueError(f"{path}: expected a JSON object that this program wrote, got {got}; {mend}")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        Path(unfinished).write_text(text, encoding="utf-8")


def save_tensors(path: Path, **tensors: torch.Tensor) -> None:
    """Write tensors to a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(tensors, file)  # an open file: torch writes a path's name into the bytes


def load_tensors(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the file of `save_tensors`; nothing in it is executed. With `mmap` only what is used is read, and the
    checksums are left to the stage's manifest.

    Raises:
        ValueError: the file is missing, damaged, or another's.
    """
    try:
        loaded: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not (mmap or is_intact(path)):
            raise OSError("a checksum differs")
    except Exception as error:  # torch reports damage as RuntimeError, UnpicklingError, OSError, EOFError ...
        what = "got none" if not path.exists() else "got a damaged or foreign file"
        raise ValueError(
            f"{path}: expected tensors that this run wrote, {what}; remove the folder {path.parent} and start again"
        ) from error
    return loaded
