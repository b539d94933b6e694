"""The random states that a call may draw from: kept, replayed, or seeded."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

_HOLDS_NONE = (type(None), bool, int, float, complex, str, bytes, type, ModuleType, torch.Tensor)
_LOOKS = 2000


class RandomState:
    """What the generators of torch, NumPy and Python would draw next: the global ones, and any others given.

    Args:
        device: The device whose own generator counts too.
        others: Further generators, as :func:`generators_of` finds them.
    """

    def __init__(self, device: torch.device, others: tuple[Any, ...] = ()) -> None:
        self.device = device
        self.others = others
        self.states = self._read()

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        return any(not _equal(a, b) for a, b in zip(self.states, self._read(), strict=True))

    def restore(self) -> None:
        """Make the generators draw the same again."""
        cpu, python, numpy, device, *others = self.states
        torch.set_rng_state(cpu)
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        if device is not None:
            getattr(torch, self.device.type).set_rng_state(device, self.device)
        for generator, state in zip(self.others, others, strict=True):
            _set(generator, state)

    def _read(self) -> list[Any]:
        numpy = sys.modules.get("numpy")
        own = None
        if self.device.type not in ("cpu", "meta") and not _capturing(self.device):
            own = getattr(torch, self.device.type).get_rng_state(self.device)
        states = [torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state(), own]
        return [*states, *(_get(generator) for generator in self.others)]


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave the random states as they were."""
    before = RandomState(device)
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def seeded_by(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Draw everything from a seed that the generator gives, and leave the global states as they were."""
    seed = int(torch.randint(2**32, (), generator=generator, device=generator.device))
    with kept(device):
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)
        yield


def generators_of(function: Callable[..., Any] | None) -> tuple[Any, ...]:
    """Generators that a function or object carries along: in its closure, defaults, globals or attributes, or theirs.

    A composition of transforms holds transforms, and each of those a generator of its own.
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}
    waiting: list[Any] = [function]
    while waiting and len(seen) < _LOOKS:  # the nearest first: whoever holds a whole data set is not walked through
        value = waiting.pop(0)
        if id(value) in seen or isinstance(value, _HOLDS_NONE):
            continue
        seen[id(value)] = value
        if _is_generator(value):
            found.append(value)
        else:
            waiting += _held_by(value)
    return tuple(found)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, Mapping):
        return list(value.values())[:_LOOKS]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)[:_LOOKS]
    if isinstance(value, FunctionType):
        if value.__module__.split(".")[0] in ("torch", "numpy"):  # their generators are the global ones
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *(value.__globals__.get(name) for name in value.__code__.co_names)]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    return list(getattr(value, "__dict__", {}).values())


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, (torch.Generator, random.Random)) or (
        numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))
    )


def _get(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(s, t) for s, t in zip(a, b, strict=True))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - a cell that is not filled yet raises
    except ValueError:
        return False
    return True


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
