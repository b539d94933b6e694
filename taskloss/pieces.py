"""A frozen network computed again piece by piece in its backward pass, so that the whole of it is never held at once.

A piece is a module inside the network. Which modules become pieces is found out once, by a forward pass that counts
what each would keep: a few that hold much and take in little.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from taskloss import lean as _lean
from taskloss.checks import InputError
from taskloss.features import AllReached
from taskloss.holdings import registered_tensors_of
from taskloss.randomness import kept
from taskloss.trees import tensors_in

_LIMITS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.04)  # of what the network keeps, that a piece may keep at most
_WORTH = 0.01  # of what the network keeps, that a piece must save at least: its second run takes time
_ENOUGH = 0.45  # of what the network keeps: a peak below it is not bought with further second runs
_NEARLY = 0.03  # of what the network keeps, that may wait between the passes for fewer second runs
_local = threading.local()


class Piece:
    """Takes the place of a module's ``forward`` on a network that nobody else holds; goes along with copies."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        run = None if torch.compiler.is_compiling() else getattr(_local, "run", None)
        forward = partial(type(self.module).forward, self.module)
        if run is None or not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return run.checkpointed(self.module, forward, inputs, named)


class Run:
    """One run in pieces.

    Attributes:
        taken: What each piece took in, with the versions that it had.
    """

    def __init__(self, is_lean: bool) -> None:
        self.is_lean = is_lean
        self.taken: list[tuple[nn.Module, list[Tensor], list[int]]] = []

    def checkpointed(self, module: nn.Module, forward: Any, inputs: Any, named: Any) -> Any:
        """The module's output, of which nothing but the input is kept."""
        from torch.utils.checkpoint import checkpoint  # it brings sympy along

        given, is_lean = list(tensors_in([inputs, named])), self.is_lean
        versions = _versions(given)
        self.taken.append((module, given, versions))

        def compute(*inputs: Any, **named: Any) -> Any:
            if _versions(given) != versions:
                raise InputError(
                    "frozen",
                    f"the input of a {type(module).__name__} was overwritten in place before the backward pass, which "
                    "needs it again; pass checkpoint=False",
                )
            try:
                with _lean.in_a_piece(is_lean):
                    return forward(*inputs, **named)
            except AllReached as reached:
                return reached

        result = checkpoint(compute, *inputs, use_reentrant=False, **named)
        if isinstance(result, AllReached):
            raise result
        return result

    def overwritten(self) -> list[nn.Module]:
        """The pieces whose input the network has overwritten since; what they took is forgotten."""
        found = [module for module, given, versions in self.taken if _versions(given) != versions]
        self.taken.clear()
        return found


@contextlib.contextmanager
def in_pieces(is_lean: bool) -> Iterator[Run]:
    """While it is open, this thread's pieces are recomputed."""
    before = getattr(_local, "run", None)
    _local.run = run = Run(is_lean)
    try:
        yield run
    finally:
        _local.run = before


def cut_(network: nn.Module, modules: list[nn.Module]) -> None:
    """Make modules pieces, and all others none."""
    for module in network.modules():
        if isinstance(module.__dict__.get("forward"), Piece):
            del module.__dict__["forward"]
    for module in modules:
        module.__dict__["forward"] = Piece(module)


@dataclass
class _Held:
    """What a module keeps for its backward pass, in bytes, and what it takes in, in bytes by storage.

    Attributes:
        before: What the network had kept when the module was first called.
    """

    before: int = 0
    kept: int = 0
    given: dict[int, int] = field(default_factory=dict)
    fits: bool = True

    @property
    def saved(self) -> int:
        """What is gained when the module is computed again."""
        return self.kept - sum(self.given.values())


class _Watch:
    """Counts what every module of a network would keep, while nothing is kept."""

    def __init__(self, network: nn.Module) -> None:
        self.held: dict[nn.Module, _Held] = {}
        self.total = 0
        self._open: list[nn.Module] = []
        self._numbers = count()
        self._ids: Any = WeakIdKeyDictionary()
        self._counted = WeakIdKeyDictionary({t.untyped_storage(): None for _, t in registered_tensors_of(network)})
        self._watched: list[tuple[weakref.ref[Tensor], int, _Held]] = []

    def enter(self, module: nn.Module, inputs: Any, named: Any) -> None:
        self._look()
        self._open.append(module)
        held = self.held.setdefault(module, _Held(self.total, fits=_is_plain(module)))
        for tensor in tensors_in([inputs, named]):
            storage = tensor.untyped_storage()
            number = self._ids.setdefault(storage, next(self._numbers))
            held.given[number] = storage.nbytes()
            self._watched.append((weakref.ref(tensor), tensor._version, held))

    def leave(self, *_: Any) -> None:
        self._look()
        self._open.pop()

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._counted:
            self._counted[storage] = None
            self.total += storage.nbytes()
            for module in dict.fromkeys(self._open):
                self.held[module].kept += storage.nbytes()

    def _look(self) -> None:
        alive = []
        for reference, version, held in self._watched:
            tensor = reference()
            if tensor is not None:
                held.fits = held.fits and tensor._version == version
                alive.append((reference, version, held))
        self._watched = alive


def find(network: nn.Module, run: Callable[[], Any], device: torch.device) -> list[nn.Module]:
    """The modules to recompute one by one; none where that would not lower the peak.

    Args:
        network: The network.
        run: Runs it once.
        device: Where it runs.
    """
    watch = _Watch(network)
    handles = []
    for module in network.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with kept(device), saved_tensors_hooks(watch.count, lambda kept: kept):
            run()
    finally:
        for handle in handles:
            handle.remove()
    best: tuple[float, list[nn.Module]] = (0.9 * watch.total, [])
    for limit in _LIMITS:
        pieces = list(dict.fromkeys(_within(network, watch.held, limit * watch.total, _WORTH * watch.total)))
        best = min(best, (_peak(pieces, watch), pieces), key=lambda found: found[0])
    return _needed(*best, watch)


def _needed(peak: float, pieces: list[nn.Module], watch: _Watch) -> list[nn.Module]:
    """Without the pieces that save least, as long as peak and rest stay where they are (nearly), or low enough."""
    low = _ENOUGH * watch.total
    highest, most = max(peak, low), max(_rest(pieces, watch) + _NEARLY * watch.total, low)
    for piece in sorted(pieces, key=lambda piece: watch.held[piece].saved):
        fewer = [other for other in pieces if other is not piece]
        if fewer and _peak(fewer, watch) <= highest and _rest(fewer, watch) <= most:
            pieces = fewer
    return pieces


def _rest(pieces: list[nn.Module], watch: _Watch) -> int:
    """What is kept between the forward and the backward pass."""
    given: dict[int, int] = {}
    for piece in pieces:
        given |= watch.held[piece].given
    return watch.total - sum(watch.held[piece].kept for piece in pieces) + sum(given.values())


def _within(module: nn.Module, held: dict[nn.Module, _Held], most: float, least: float) -> Iterator[nn.Module]:
    """The outermost modules that keep no more than ``most``, and at least so much more than they take in."""
    own = held.get(module)
    if own is not None and own.fits and own.kept <= most:
        if own.saved > least:
            yield module
    else:
        yield from chain.from_iterable(_within(child, held, most, least) for child in module.children())


def _peak(pieces: list[nn.Module], watch: _Watch) -> float:
    """The most that is kept at once in the backward pass, which frees what follows a piece before it gets there."""
    given: dict[int, int] = {}
    gone, highest = 0, _rest(pieces, watch)
    for held in sorted((watch.held[piece] for piece in pieces), key=lambda held: held.before):
        given |= held.given
        highest = max(highest, held.before - gone + sum(given.values()) + held.kept)
        gone += held.kept
    return highest


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's ``forward``."""
    return (
        "forward" not in module.__dict__
        and type(module).__call__ is nn.Module.__call__
        and getattr(module, "_compiled_call_impl", None) is None
        and not isinstance(module, torch.jit.ScriptModule)
    )


def _versions(tensors: list[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
