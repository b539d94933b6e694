"""One set of settings at a time in a run's folder: processes that share it work together, any other waits outside."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import IO

from .files import write_text

_HELD: dict[Path, IO[bytes]] = {}  # for as long as the process lives; the system lets go of a lock when it ends


@atexit.register
def _let_go() -> None:
    while _HELD:
        _HELD.popitem()[1].close()


def occupy(run: Path, settings_yaml: str) -> None:
    """Take a run's folder for these settings and write them there as `settings.yaml`.

    Shards, processes of one training and single stages share the folder where their settings are the same. The lock
    is the system's: a killed process leaves none behind. Where there are no such locks (Windows), the settings are
    written and nothing is guarded.

    Raises:
        ValueError: another process works there with other settings.
    """
    run.mkdir(parents=True, exist_ok=True)
    key = run.resolve()
    try:
        import fcntl
    except ImportError:
        write_text(run / "settings.yaml", settings_yaml)
        return
    if key in _HELD:
        _HELD.pop(key).close()
    lock = open(run / ".lock", "a+b")  # noqa: SIM115  (held beyond this function)
    _HELD[key] = lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for no more than another's writing of its settings
        there = run / "settings.yaml"
        if not there.exists() or there.read_text(encoding="utf-8") != settings_yaml:
            _HELD.pop(key).close()
            raise ValueError(
                f"{run}: expected a folder that is free or used with the same settings, got one where another process "
                "works with others; wait for it, or give another --output"
            ) from None
        return
    write_text(run / "settings.yaml", settings_yaml)
    fcntl.flock(lock, fcntl.LOCK_SH)
