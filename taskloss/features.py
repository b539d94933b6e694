"""The outputs of a network's inner layers, caught on their way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.arguments import arguments
from taskloss.checks import InputError, nearest
from taskloss.trees import map_tensors, tensors_in

_lock = threading.Lock()


def capture(network: nn.Module, x: Any, layers: Sequence[str]) -> tuple[Any, ...]:
    """What the named layers give at their first call; the network stops once it has them all.

    Raises:
        InputError: If a layer never runs, or is overwritten in place after it ran.
    """
    found: dict[str, tuple[Any, list[int]]] = {}
    caller = _thread()

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if _thread() != caller:
                return  # another thread runs the same network for itself
            if name not in found:
                output = map_tensors(output, _own)
                found[name] = output, _versions(output)
            if len(found) == len(layers):
                raise AllReached

        return hook

    with _registering():
        handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with contextlib.suppress(AllReached):
            positional, named = arguments(x)
            network(*positional, **named)
    finally:
        with _registering():
            for handle in handles:
                handle.remove()
    for name in layers:
        if name not in found:
            raise InputError("features", f"layer {name!r} never ran in the network's forward pass")
        output, versions = found[name]
        if _versions(output) != versions:
            raise InputError(
                "features",
                f"layer {name!r} is overwritten in place by the layer after it; name that layer instead, "
                "or set its inplace to False",
            )
    return tuple(found[name][0] for name in layers)


def check_layers(where: str, network: nn.Module, layers: Sequence[str]) -> None:
    """Refuse a layer path that the network does not have."""
    known = {name for name, _ in network.named_modules() if name}
    for layer in layers:
        if layer not in known:
            raise InputError(
                where,
                f"the network has no layer {layer!r}; {nearest(layer, known)} "
                "(see [name for name, _ in network.named_modules()])",
            )


class AllReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass that has nothing left to give."""


def _own(tensor: Tensor) -> Tensor:
    # Tensors of inference mode do not count their versions: nobody could tell that one was overwritten.
    return tensor.clone() if tensor.is_inference() else tensor


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in tensors_in(output) if not tensor.is_inference()]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _registering() -> contextlib.AbstractContextManager[object]:
    # torch hands out hook ids without a lock of its own.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _lock
