"""Terms of one sum that look at the same image through the same network, and run it once for all of them."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

_local = threading.local()


class Look(NamedTuple):
    """What a term is going to look at.

    Attributes:
        through: Equal for two looks that may be one: the network, how it is run, and what is done to the image first.
        layers: The layers whose outputs it takes; ``""`` is the network itself.
    """

    through: Hashable
    layers: tuple[str, ...]


class Step:
    """The looks of one step: those to come, and what was seen and is still waited for.

    Args:
        looks: All that the terms are going to take; None for one that cannot be shared.
    """

    def __init__(self, looks: Iterable[Look | None]) -> None:
        self._waiting: dict[Hashable, list[tuple[str, ...]]] = defaultdict(list)
        self._seen: dict[Hashable, tuple[tuple[object, ...], Any]] = {}
        for look in filter(None, looks):
            self._waiting[look.through].append(look.layers)

    def take(self, look: Look, at: tuple[object, ...], see: Callable[[set[str]], Any]) -> Any:
        """What is seen, by whoever asks first for the layers of all; None where nobody else will ask for it.

        Args:
            look: One of the looks to come.
            at: The image, and what else must be the same object.
            see: Called with the layers that somebody waits for.
        """
        self.leave(look)
        waiting = self._waiting[look.through]
        if look.through not in self._seen:
            if not waiting:
                return None
            self._seen[look.through] = at, see({*look.layers, *chain(*waiting)})
        before, seen = self._seen[look.through]
        if not waiting:
            del self._seen[look.through]
        return seen if all(a is b for a, b in zip(before, at, strict=True)) else None

    def leave(self, look: Look) -> None:
        """Strike out a look."""
        with contextlib.suppress(ValueError):
            self._waiting[look.through].remove(look.layers)

    @property
    def is_waited_for(self) -> bool:
        """Whether anything that was seen will be taken again, so that its graph is still needed."""
        return bool(self._seen)


@contextlib.contextmanager
def step_of(looks: Iterable[Look | None]) -> Iterator[Step]:
    """While it is open, this thread's terms find each other; nothing that they saw is kept beyond it."""
    before = current()
    _local.step = Step(looks)
    try:
        yield _local.step
    finally:
        _local.step = before


def leave(looks: Iterable[Look | None]) -> None:
    """Strike out looks that will not be taken in this step after all."""
    if (found := current()) is not None:
        for look in filter(None, looks):
            found.leave(look)


def current() -> Step | None:
    """The innermost step that is open in this thread."""
    return getattr(_local, "step", None)
