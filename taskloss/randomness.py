"""The random states that a call may draw from: kept, replayed, or seeded."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


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
def seeded_by(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Draw everything from a seed that the generator gives, and leave the global states as they were."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**32, (), generator=generator, device=generator.device))
    with kept(device):
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)
        yield


def generators_of(function: Callable[..., Any] | None) -> tuple[Any, ...]:
    """Generators that a function or module carries along: in its closure, defaults, attributes or globals."""
    held: list[Any] = []
    if isinstance(function, functools.partial):
        held += [*function.args, *function.keywords.values()]
        return (*(h for h in held if _is_generator(h)), *generators_of(function.func))
    if isinstance(function, nn.Module):
        held += [value for module in function.modules() for value in vars(module).values()]
    elif (code := getattr(function, "__code__", None)) is not None:
        held += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]  # type: ignore[union-attr]
        held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]  # type: ignore[union-attr]
        held += [function.__globals__.get(name) for name in code.co_names]  # type: ignore[union-attr]
    else:
        held += list(getattr(getattr(function, "__self__", function), "__dict__", {}).values())
    return tuple(h for h in held if _is_generator(h))


def _is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, (torch.Generator, random.Random)) or (
        numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))
    )


def _get(generator: Any) -> Any:
    if isinstance(generator, (torch.Generator, sys.modules["numpy"].random.RandomState)):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, (torch.Generator, sys.modules["numpy"].random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
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
